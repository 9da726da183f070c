//! The command line: one file a command. What was typed becomes a library call, and its outcome
//! becomes output and an exit code.

mod backup;
mod check;
mod context;
mod exit;
mod include;
mod init;
mod list;
mod logging;
mod output;
mod repair;
mod restore;
mod run;
mod slot;
mod status;
mod wal_fetch;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

pub use exit::{CliError, Exit};
pub use wal_fetch::{Mode as WalFetchMode, guarded as wal_fetch_guarded};

/// Continuous archiving for PostgreSQL: WAL and base backups into several regions at once, and back
/// to any moment.
#[derive(Debug, Parser)]
#[command(name = "pgkeep", version, propagate_version = true, max_term_width = 100)]
pub struct Cli {
    /// The configuration [default: ./pgkeep.toml, else /etc/pgkeep/pgkeep.toml]
    #[arg(long, global = true, env = "PGKEEP_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Say more; twice for everything
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// How log lines look
    #[arg(long, global = true, value_enum, default_value = "text")]
    pub log_format: logging::LogFormat,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Write a configuration and check it
    Init(init::Args),
    /// Test everything that the configuration needs, item by item
    Check(check::Args),
    /// Stream WAL into the regions until told to stop
    Run(run::Args),
    /// Take a base backup now
    Backup(backup::Args),
    /// List the backups
    List(list::Args),
    /// Tell where the archive stands, region by region
    Status(status::Args),
    /// Make every region hold what any region holds
    Repair(repair::Args),
    /// Show, create or drop the replication slots
    Slot(slot::Args),
    /// Restore a data directory to any moment
    Restore(restore::Args),
    /// Give PostgreSQL a WAL file: its restore_command
    WalFetch(wal_fetch::Args),
}

/// Runs what was typed.
pub async fn run(cli: Cli) -> Result<Exit, CliError> {
    let context = context::Context { config: cli.config };
    match cli.command {
        Command::Init(args) => init::run(&context, args).await,
        Command::Check(args) => check::run(&context, args).await,
        Command::Run(args) => run::run(&context, args).await,
        Command::Backup(args) => backup::run(&context, args).await,
        Command::List(args) => list::run(&context, args).await,
        Command::Status(args) => status::run(&context, args).await,
        Command::Repair(args) => repair::run(&context, args).await,
        Command::Slot(args) => slot::run(&context, args).await,
        Command::Restore(args) => restore::run(&context, args).await,
        Command::WalFetch(args) => wal_fetch::run(&context, args).await,
    }
}

/// The whole program: from arguments to the exit code.
pub fn main() -> u8 {
    let arguments: Vec<std::ffi::OsString> = std::env::args_os().collect();
    // PostgreSQL reads a meaning into every exit code of its restore_command.
    if let Some(mode) = wal_fetch::mode_of(&arguments) {
        return wal_fetch::guarded(mode, || wal_fetch::main(&arguments));
    }
    let cli = match Cli::try_parse_from(&arguments) {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { Exit::Usage as u8 } else { Exit::Done as u8 };
        }
    };
    logging::start(cli.verbose, cli.log_format);
    let outcome = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(run(cli)),
        Err(error) => Err(CliError::new(Exit::Failed, format!("cannot start: {error}"))),
    };
    match outcome {
        Ok(exit) => exit as u8,
        Err(error) => {
            output::complain(&error);
            error.exit as u8
        }
    }
}
