//! `pgkeep repair`: makes every region hold what any region holds.

use std::sync::Arc;

use clap::Args as ClapArgs;
use serde::Serialize;

use super::context::{Context, open_readable};
use super::{CliError, Exit, output};
use crate::config::Config;
use crate::progress::Progress;
use crate::store::Regions;
use crate::store::repair::{
    DamageOutcome, ObjectKind, RegionReport, RegionState, RepairOptions, RepairReport, repair,
};

/// Arguments of `repair`.
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// Repair only this region, and fill it if it holds nothing yet; may be given again
    #[arg(long, value_name = "NAME")]
    region: Vec<String>,
    /// Copy only from this region; may be given again
    #[arg(long, value_name = "NAME")]
    from: Vec<String>,
    /// Fill this region too, although it holds nothing of the archive while others do
    #[arg(long, value_name = "NAME")]
    new_region: Vec<String>,
    /// Only this system identifier
    #[arg(long, value_name = "ID")]
    lineage: Option<u64>,
    /// Read and verify every byte that is there, and replace what is damaged
    #[arg(long, visible_alias = "check")]
    deep: bool,
    /// Tell what would be copied, and write nothing
    #[arg(long)]
    dry_run: bool,
    /// Print the outcome as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report<'a> {
    cluster: &'a str,
    /// Regions that could not even be opened.
    unopened: &'a [String],
    lineages: &'a [RepairReport],
}

/// Repairs, and tells what was lacking and what still is.
pub async fn run(context: &Context, args: Args) -> Result<Exit, CliError> {
    let config = context.load()?;
    let regions = open_readable(&config, &[])?;
    let unopened = unopened(&config, &regions, &args)?;
    let options = RepairOptions {
        lineage: args.lineage,
        targets: args.region,
        new_regions: args.new_region,
        sources: args.from,
        deep: args.deep,
        dry_run: args.dry_run,
    };
    let progress = Arc::new(Progress::default());
    let shown = output::show_progress("repair", &progress);
    let outcome = repair(&regions.within(&config.cluster.name), &options, &progress).await;
    drop(shown);
    let reports = outcome?;
    if args.json {
        let cluster = &config.cluster.name;
        output::json(&Report { cluster, unopened: &unopened, lineages: &reports })?;
    } else {
        reports.iter().for_each(print);
    }
    Ok(exit(&reports, !unopened.is_empty()))
}

/// The configured regions that are not among the opened ones; a name that the configuration does
/// not know is a mistake.
fn unopened(config: &Config, regions: &Regions, args: &Args) -> Result<Vec<String>, CliError> {
    let known = |name: &String| config.regions.iter().any(|region| region.name == *name);
    let named = args.region.iter().chain(&args.from).chain(&args.new_region);
    if let Some(name) = named.into_iter().find(|name| !known(name)) {
        return Err(CliError::new(Exit::Usage, format!("no region is named {name:?}")));
    }
    let names = config.regions.iter().map(|region| region.name.clone());
    Ok(names.filter(|name| !regions.iter().any(|region| region.name() == name)).collect())
}

fn exit(reports: &[RepairReport], unopened: bool) -> Exit {
    if reports.iter().any(|report| !report.diverged.is_empty()) {
        return Exit::Diverged;
    }
    if reports.iter().any(RepairReport::has_lost) {
        return Exit::Integrity;
    }
    match !unopened && reports.iter().all(RepairReport::is_whole) {
        true => Exit::Done,
        false => Exit::FewerRegions,
    }
}

fn print(report: &RepairReport) {
    output::line(&format!("system identifier {}", report.system_identifier));
    let rows: Vec<_> = report.regions.iter().map(|region| row(region, report.dry_run)).collect();
    let copied = if report.dry_run { "WOULD COPY" } else { "COPIED" };
    output::table(&["REGION", "STATE", copied, "VERIFIED"], &rows);
    for region in &report.regions {
        for what in &region.lacking {
            output::line(&format!("region {}: LACKING {what}", region.name));
        }
        if region.state == RegionState::NewOrLost {
            output::line(&format!(
                "region {0} holds nothing of this archive: is it the right bucket or folder, and is its disk mounted? If it is new or was lost, \"pgkeep repair --new-region {0}\" fills it",
                region.name
            ));
        }
    }
    for object in &report.damaged {
        let outcome = match object.outcome {
            DamageOutcome::Replaced => "replaced by a good copy",
            DamageOutcome::Remains => "not replaced yet",
            DamageOutcome::Covered => "not needed: other objects hold the same",
            DamageOutcome::Lost => "LOST: no region that was read has a good copy",
        };
        output::line(&format!(
            "DAMAGED in {}: {}: {}; {outcome}",
            object.region, object.key, object.problem
        ));
    }
    for hole in &report.wal_holes {
        output::line(&format!(
            "MISSING everywhere: WAL of timeline {} from {} to {}",
            hole.timeline, hole.from, hole.to
        ));
    }
    for object in &report.lost_objects {
        output::line(&format!("LOST: {object}"));
    }
    for what in &report.diverged {
        output::line(&format!("DIVERGED: {what}"));
    }
    if !report.diverged.is_empty() {
        output::note(
            "hint: nothing behind that point was copied; look which region has the right history, and name it with --from to fill an empty region from it alone",
        );
    }
}

fn row(region: &RegionReport, dry_run: bool) -> Vec<String> {
    let state = match region.state {
        RegionState::Whole => "whole",
        RegionState::Lacking if dry_run => "to be repaired",
        RegionState::Lacking => "LACKING",
        RegionState::NewOrLost => "NEW OR LOST",
        RegionState::Unreachable => "UNREACHABLE",
        RegionState::NotRepaired => "only read",
    };
    let kinds = region.copied.iter().map(|(kind, tally)| {
        let (one, many) = names(*kind);
        let name = if tally.objects == 1 { one } else { many };
        format!("{} {name} ({})", tally.objects, output::bytes(tally.bytes))
    });
    let copied = kinds.collect::<Vec<_>>().join(", ");
    let verified = match region.verified.objects {
        0 => "-".to_owned(),
        objects => format!("{objects} objects ({})", output::bytes(region.verified.bytes)),
    };
    let copied = if copied.is_empty() { "nothing".to_owned() } else { copied };
    vec![region.name.clone(), state.to_owned(), copied, verified]
}

fn names(kind: ObjectKind) -> (&'static str, &'static str) {
    match kind {
        ObjectKind::Lineage => ("lineage.json", "lineage.json"),
        ObjectKind::History => ("history file", "history files"),
        ObjectKind::Gap => ("gap", "gaps"),
        ObjectKind::Wal => ("piece of WAL", "pieces of WAL"),
        ObjectKind::RollUp => ("roll-up", "roll-ups"),
        ObjectKind::Pack => ("pack", "packs"),
        ObjectKind::BackupIndex => ("index of a backup", "indexes of backups"),
        ObjectKind::BackupExtra => ("file of a backup", "files of backups"),
        ObjectKind::Backup => ("backup.json", "backup.json"),
    }
}
