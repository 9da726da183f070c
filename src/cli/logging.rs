//! Log lines: on stderr, as text or JSON. Programs read stdout.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For programs: one JSON object a line.
    Json,
}

/// Starts logging. `PGKEEP_LOG` overrides the level, in tracing's syntax.
pub fn start(verbose: u8, format: LogFormat) {
    let level = match verbose {
        0 => "pgkeep=info,warn",
        1 => "pgkeep=debug,info",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_env("PGKEEP_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(verbose > 0);
    let started = match format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
    // A second start in one process changes nothing.
    drop(started);
}
