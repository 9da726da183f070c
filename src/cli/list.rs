//! `pgkeep list`: the backups.

use clap::Args as ClapArgs;
use serde::Serialize;

use super::context::{Context, catalog, open_readable};
use super::{CliError, Exit, output};
use crate::repo::BackupInfo;
use crate::serve::GapStatus;

/// Arguments of `list`.
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// Only what this region has; may be given again
    #[arg(long, value_name = "NAME")]
    region: Vec<String>,
    /// The system identifier, when the archive holds several
    #[arg(long, value_name = "ID")]
    lineage: Option<u64>,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

/// Checksum failures that are named for each backup.
const FAILURES_SHOWN: usize = 10;

#[derive(Serialize)]
struct Report<'a> {
    cluster: &'a str,
    system_identifier: &'a str,
    backups: Vec<Entry<'a>>,
    gaps: Vec<GapStatus>,
}

#[derive(Serialize)]
struct Entry<'a> {
    #[serde(flatten)]
    info: &'a BackupInfo,
    regions: &'a [String],
}

/// Lists them, oldest first.
pub async fn run(context: &Context, args: Args) -> Result<Exit, CliError> {
    let config = context.load()?;
    let regions = open_readable(&config, &args.region)?;
    let catalog = catalog(&config, &regions, args.lineage).await?;
    if args.json {
        let backups = catalog.backups.values().map(|(info, regions)| Entry { info, regions });
        let gap = |g: &(_, _, _)| GapStatus { timeline: g.0, from: g.1, to: g.2 };
        output::json(&Report {
            cluster: &catalog.lineage.cluster,
            system_identifier: &catalog.lineage.system_identifier,
            backups: backups.collect(),
            gaps: catalog.gaps.iter().map(gap).collect(),
        })?;
        return Ok(Exit::Done);
    }
    if catalog.backups.is_empty() {
        output::note("there is no backup yet; \"pgkeep backup\" takes one");
    } else {
        let rows: Vec<_> =
            catalog.backups.values().map(|(info, regions)| row(info, regions)).collect();
        output::table(
            &[
                "LABEL",
                "TYPE",
                "TL",
                "ENDED",
                "SIZE",
                "NEW",
                "STORED",
                "START LSN",
                "STOP LSN",
                "REGIONS",
                "NOTE",
            ],
            &rows,
        );
    }
    for (info, _) in catalog.backups.values() {
        tell_checksum_failures(info);
    }
    for (timeline, from, to) in &catalog.gaps {
        output::line(&format!(
            "GAP on timeline {timeline} from {from} to {to}: no restore crosses it"
        ));
    }
    Ok(Exit::Done)
}

/// Which pages the server found damaged.
fn tell_checksum_failures(info: &BackupInfo) {
    for failure in info.checksum_failures.iter().take(FAILURES_SHOWN) {
        output::line(&format!("DAMAGE in {}: {failure}", info.label));
    }
    let more = info.checksum_failures.len().saturating_sub(FAILURES_SHOWN);
    if more > 0 {
        output::line(&format!("DAMAGE in {}: {more} more (--json names all)", info.label));
    }
}

fn row(info: &BackupInfo, regions: &[String]) -> Vec<String> {
    let counts = [
        (info.checksum_failures.len(), "checksum failures"),
        (info.include_failures.len(), "paths not captured"),
    ];
    let notes = counts.iter().filter(|(count, _)| *count > 0);
    let note = notes.map(|(count, what)| format!("{count} {what}")).collect::<Vec<_>>().join(", ");
    vec![
        info.label.to_string(),
        info.kind.to_string(),
        info.timeline.to_string(),
        info.stop_time.format("%Y-%m-%d %H:%M:%S UTC").to_string(),
        output::bytes(info.size),
        output::bytes(info.new_size),
        output::bytes(info.stored_size),
        info.start_lsn.to_string(),
        info.stop_lsn.to_string(),
        regions.join(","),
        note,
    ]
}
