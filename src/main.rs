//! The program: everything is in the library.

fn main() -> std::process::ExitCode {
    pgkeep::cli::main().into()
}
