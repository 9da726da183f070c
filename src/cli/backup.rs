//! `pgkeep backup`: a base backup now.

use std::sync::Arc;

use clap::{Args as ClapArgs, ValueEnum};
use serde::Serialize;

use super::context::{Context, conninfo, open_regions};
use super::{CliError, Exit, output};
use crate::archive::ArchiveSettings;
use crate::backup::{BackupOutcome, BackupRequest, BackupType, Progress, take_backup};
use crate::pg::Connector;
use crate::repo::BackupInfo;

/// The types that can be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Type {
    /// Everything
    Full,
    /// What changed since the newest backup
    Incremental,
    /// What changed since the newest full backup
    Differential,
}

impl From<Type> for BackupType {
    fn from(kind: Type) -> BackupType {
        match kind {
            Type::Full => BackupType::Full,
            Type::Incremental => BackupType::Incremental,
            Type::Differential => BackupType::Differential,
        }
    }
}

/// Arguments of `backup`.
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// What kind of backup
    #[arg(long = "type", value_enum, default_value = "full")]
    kind: Type,
    /// Kilobytes a second that the server sends at most (32 to 1048576); otherwise backup.max_rate
    #[arg(long, value_name = "KB", value_parser = clap::value_parser!(u32).range(32..=1_048_576))]
    max_rate: Option<u32>,
    /// Wait for the next scheduled checkpoint instead of asking for one
    #[arg(long)]
    spread_checkpoint: bool,
    /// Print the outcome as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    info: &'a BackupInfo,
    regions: &'a [String],
    failures: Vec<String>,
    seconds: f64,
}

/// Takes the backup and prints its label.
pub async fn run(context: &Context, args: Args) -> Result<Exit, CliError> {
    let config = context.load()?;
    let regions = open_regions(&config, &[])?;
    let request = BackupRequest {
        kind: args.kind.into(),
        connector: Connector::new(conninfo(&config)?),
        archive: ArchiveSettings::new(&config.cluster, &config.wal),
        has_archiver: false,
        on_checksum_failure: config.backup.on_checksum_failure,
        compression_level: config.backup.compression_level,
        max_rate: args.max_rate.or(config.backup.max_rate_kilobytes()),
        spread_checkpoint: args.spread_checkpoint,
        wal_timeout: config.backup.wal_timeout.0,
        include: config.backup.include.clone(),
    };
    let progress = Arc::new(Progress::default());
    let shown = output::show_progress("backup", &progress);
    let outcome = take_backup(&request, &regions, &progress).await;
    drop(shown);
    let outcome = outcome?;
    if args.json {
        output::json(&Report {
            info: &outcome.info,
            regions: &outcome.regions,
            failures: outcome.failures.iter().map(ToString::to_string).collect(),
            seconds: outcome.elapsed.as_secs_f64(),
        })?;
    } else {
        output::line(outcome.info.label.as_str());
    }
    Ok(tell(&outcome))
}

fn tell(outcome: &BackupOutcome) -> Exit {
    let info = &outcome.info;
    output::note(&format!(
        "backup {} of {} in {} files took {}; {} stored in {}",
        info.label,
        output::bytes(info.size),
        info.files,
        output::duration(outcome.elapsed),
        output::bytes(info.stored_size),
        outcome.regions.join(", "),
    ));
    if let Some(included) = &info.include {
        output::note(&format!(
            "with it {} captured files, {}",
            included.files,
            output::bytes(included.bytes)
        ));
    }
    for failure in &info.include_failures {
        output::note(&format!("error: not captured as a whole: {failure}"));
    }
    for failure in &outcome.failures {
        output::note(&format!("error: {failure}"));
    }
    for failure in &info.checksum_failures {
        output::note(&format!("error: the server reports: {failure}"));
    }
    let is_everywhere = outcome.failures.is_empty() && info.include_failures.is_empty();
    match (info.checksum_failures.is_empty(), is_everywhere) {
        (false, _) => Exit::Integrity,
        (true, false) => Exit::FewerRegions,
        (true, true) => Exit::Done,
    }
}
