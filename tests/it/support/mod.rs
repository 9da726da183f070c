//! What the tests stand on: real servers, the real program, and patience without sleeps.

mod keeper;
mod process;
mod s3;
mod server;

pub use keeper::{Keeper, files_below};
pub use process::{Folder, Spawned, cache, free_port, program, user_command, wait_until};
pub use s3::S3Server;
pub use server::{Server, ServerOptions};

/// Rounds of a randomised test: from an environment variable, else the number for every change.
pub fn rounds(variable: &str, default: usize) -> usize {
    match std::env::var(variable) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{variable}={text} is not a number")),
        Err(_) => default,
    }
}
