//! `pgkeep wal-fetch`: the `restore_command`. PostgreSQL reads a meaning into its exit code, so
//! every way out is mapped here (invariant I4; `RestoreArchivedFile` in
//! `src/backend/access/transam/xlogarchive.c`):
//!
//! | code | PostgreSQL takes it for | used for |
//! |---|---|---|
//! | 0 | the file is there | the file is there |
//! | 1 to 125 | there is no such file: the end of the WAL, so it may promote | only beyond the plan's end; following as a standby, anything that cannot be given now |
//! | above 125, but 143 | stop with FATAL | every other failure of a one-shot recovery |

use std::ffi::OsString;
use std::panic::{UnwindSafe, catch_unwind};
use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser};

use super::context::{Context, open_readable};
use super::{Cli, CliError, Command, Exit, logging, output};
use crate::restore::{Fetched, Plan, Source, read_plan};
use crate::store::Regions;

/// Ends recovery, or makes a standby try again.
const NOT_THERE: u8 = 1;
/// Stops the server.
const STOP: u8 = 255;

/// How the server uses what it gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Recovers once and then opens: nothing may look like an early end.
    OneShot,
    /// Follows for ever: it asks again by itself.
    Standby,
}

/// Arguments of `wal-fetch`.
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// The file's name: %f
    file: String,
    /// Where it goes: %p
    path: PathBuf,
    /// The server is a standby: what cannot be given now is asked for again
    #[arg(long)]
    standby: bool,
}

/// The mode, if this is `wal-fetch`: from the bare arguments, because they may be wrong.
pub fn mode_of(arguments: &[OsString]) -> Option<Mode> {
    let mut words = arguments.iter().skip(1).map(|argument| argument.to_string_lossy());
    let command = loop {
        let word = words.next()?;
        match word.as_ref() {
            // The options before the command that take a value of their own.
            "--config" | "--log-format" => drop(words.next()),
            option if option.starts_with('-') => {}
            _ => break word,
        }
    };
    let rest: Vec<_> = words.collect();
    let is = |word: &str| rest.iter().any(|argument| argument == word);
    if command != "wal-fetch" || is("--help") || is("-h") {
        return None;
    }
    Some(if is("--standby") { Mode::Standby } else { Mode::OneShot })
}

/// The exit code for an outcome.
pub fn exit_code(mode: Mode, outcome: &Result<Fetched, String>) -> u8 {
    match (mode, outcome) {
        (_, Ok(Fetched::Delivered)) => 0,
        (_, Ok(Fetched::NotThere)) | (Mode::Standby, Err(_)) => NOT_THERE,
        (Mode::OneShot, Err(_)) => STOP,
    }
}

/// Runs `work`; a panic is a failure like any other.
pub fn guarded(mode: Mode, work: impl FnOnce() -> Result<Fetched, String> + UnwindSafe) -> u8 {
    let outcome = catch_unwind(work).unwrap_or_else(|_| Err("wal-fetch panicked".into()));
    exit_code(mode, &outcome)
}

/// From arguments to outcome.
pub fn main(arguments: &[OsString]) -> Result<Fetched, String> {
    let cli = Cli::try_parse_from(arguments).map_err(|error| {
        let _ = error.print();
        error.to_string()
    })?;
    logging::start(cli.verbose, cli.log_format);
    let context = Context { config: cli.config };
    let Command::WalFetch(args) = cli.command else {
        return Err("not wal-fetch".into());
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| error.to_string())?;
    let outcome = runtime.block_on(fetch(&context, &args));
    // Nothing that still hangs on a store may hold up PostgreSQL.
    runtime.shutdown_background();
    outcome.map_err(|error| {
        let named =
            CliError { message: format!("wal-fetch {}: {}", args.file, error.message), ..error };
        output::complain(&named);
        named.message
    })
}

async fn fetch(context: &Context, args: &Args) -> Result<Fetched, CliError> {
    let failed = |error: &dyn std::fmt::Display| CliError::new(Exit::Failed, error.to_string());
    let here = std::env::current_dir().map_err(|error| failed(&error))?;
    let plan = read_plan(&here).map_err(|error| failed(&error))?;
    let config = context.load()?;
    let source = match plan {
        Some(plan) => {
            // Only what the restore was allowed to read: the others may hold another history.
            let regions = open_readable(&config, &plan.regions)?;
            from_plan(&plan, &regions.within(&config.cluster.name), args.standby)?
        }
        None => {
            return Err(CliError::new(
                Exit::Failed,
                format!(
                    "{} is not a directory that pgkeep restored: it has no {}",
                    here.display(),
                    crate::restore::PLAN_FILE
                ),
            ));
        }
    };
    let outcome = source.fetch(&args.file, &args.path).await;
    outcome.map_err(|error| failed(&error))
}

fn from_plan(plan: &Plan, regions: &Regions, standby: bool) -> Result<Source, CliError> {
    let system_id = plan.system_identifier.parse().map_err(|_| {
        CliError::new(
            Exit::Failed,
            format!("the plan names {:?} as system identifier", plan.system_identifier),
        )
    })?;
    Ok(Source {
        regions: regions.within(&plan.system_identifier),
        system_id,
        segment_size: plan.wal_segment_size,
        path: (!standby).then(|| plan.path.clone()),
    })
}

/// Never called: `main` handles `wal-fetch` before any other command.
pub async fn run(context: &Context, args: Args) -> Result<Exit, CliError> {
    fetch(context, &args).await.map(|_| Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    // CASES 1: "not found" ends recovery; nothing else may look like it.
    #[test]
    fn in_a_one_shot_recovery_only_the_plans_end_may_look_like_the_end() {
        let failure = || Err("the network is down".to_owned());
        assert_eq!(exit_code(Mode::OneShot, &Ok(Fetched::Delivered)), 0);
        assert_eq!(exit_code(Mode::OneShot, &Ok(Fetched::NotThere)), 1);
        assert!(exit_code(Mode::OneShot, &failure()) > 125);
        assert_ne!(exit_code(Mode::OneShot, &failure()), 143);
        assert_eq!(exit_code(Mode::Standby, &failure()), 1);
    }

    #[test]
    fn a_panic_and_wrong_arguments_stop_a_recovery_and_not_a_standby() {
        assert_eq!(guarded(Mode::OneShot, || panic!("on purpose")), STOP);
        assert_eq!(guarded(Mode::Standby, || panic!("on purpose")), NOT_THERE);
        let words = |text: &str| text.split(' ').map(OsString::from).collect::<Vec<_>>();
        let wrong = words("pgkeep wal-fetch --no-such-option f p");
        let mode = mode_of(&wrong).unwrap();
        assert_eq!(guarded(mode, || main(&wrong)), STOP);
        assert_eq!(
            mode_of(&words("pgkeep --config x wal-fetch --standby f p")),
            Some(Mode::Standby)
        );
        assert_eq!(mode_of(&words("pgkeep restore --pgdata wal-fetch")), None);
    }
}
