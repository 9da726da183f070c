//! `pgkeep status`: where the archive stands.

use std::time::Duration;

use chrono::{DateTime, Utc};
use clap::Args as ClapArgs;

use super::context::{Context, catalog, open_readable};
use super::{CliError, Exit, output};
use crate::config::Config;
use crate::pg::SlotStatus;
use crate::serve::{Objectives, StatusReport, ask, status_from_regions};

/// Arguments of `status`.
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// The system identifier, when the archive holds several
    #[arg(long, value_name = "ID")]
    lineage: Option<u64>,
    /// Do not ask the sidecar: tell what the regions say
    #[arg(long)]
    from_regions: bool,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

/// What the sidecar read from the regions so long ago is told with its age.
const OLD_SECONDS: f64 = 30.0;

/// Asks the sidecar; if none answers, the regions.
pub async fn run(context: &Context, args: Args) -> Result<Exit, CliError> {
    let config = context.load()?;
    let report = report(&config, &args).await?;
    if args.json {
        output::json(&report)?;
    } else {
        print(&report);
    }
    Ok(Exit::Done)
}

async fn report(config: &Config, args: &Args) -> Result<StatusReport, CliError> {
    let listen = &config.http.listen;
    if !args.from_regions && args.lineage.is_none() && !listen.is_empty() {
        match ask(listen).await {
            // Another cluster's sidecar may listen there.
            Ok(report) if report.cluster.name == config.cluster.name => return Ok(report),
            Ok(report) => tracing::debug!("{listen} serves {}", report.cluster.name),
            Err(error) => tracing::debug!("no sidecar at {listen}: {error}"),
        }
    }
    let regions = open_readable(config, &[])?;
    let catalog = catalog(config, &regions, args.lineage).await?;
    let objectives = Objectives { rpo: config.objectives.rpo.0, rto: config.objectives.rto.0 };
    Ok(status_from_regions(&catalog, objectives).await?)
}

fn print(report: &StatusReport) {
    let unknown = || "unknown".to_owned();
    let cluster = &report.cluster;
    output::line(&format!(
        "cluster {} (system identifier {}, PostgreSQL {}, timeline {}), {}",
        cluster.name,
        cluster.system_identifier.clone().unwrap_or_else(unknown),
        cluster.server_version.clone().unwrap_or_else(unknown),
        cluster.timeline.map_or_else(unknown, |timeline| timeline.to_string()),
        match report.streaming {
            Some(true) => "streaming",
            Some(false) => "NOT STREAMING",
            None => "as the regions tell (no sidecar answers here)",
        },
    ));
    if let Some(trouble) = &report.trouble {
        output::line(&format!("trouble: {trouble}"));
    }
    for alarm in &report.alarms {
        output::line(&format!("ALARM: {alarm}"));
    }
    let rows: Vec<_> = report
        .regions
        .iter()
        .map(|region| {
            vec![
                region.name.clone(),
                region.state.clone(),
                region.archived_lsn.map_or_else(|| "-".into(), |lsn| lsn.to_string()),
                region.lag_bytes.map_or_else(|| "-".into(), output::bytes),
                region.lag_seconds.map_or_else(
                    || "-".into(),
                    |lag| output::duration(Duration::try_from_secs_f64(lag).unwrap_or_default()),
                ),
                region.last_error.clone().unwrap_or_default(),
            ]
        })
        .collect();
    output::table(&["REGION", "STATE", "ARCHIVED", "LAG", "LAG TIME", "LAST ERROR"], &rows);
    if let Some(slot) = &report.slot {
        output::line(&slot_text(slot));
    }
    match report.catalog_age_seconds {
        Some(age) if age > OLD_SECONDS => output::line(&format!(
            "no region answers; what follows is {} old",
            output::duration(Duration::try_from_secs_f64(age).unwrap_or_default())
        )),
        Some(_) => {}
        None => {
            return output::line(
                "no region has answered yet: recovery window and backups are not known",
            );
        }
    }
    print_archive(report);
}

/// The slot on the server in one line.
fn slot_text(slot: &SlotStatus) -> String {
    let SlotStatus { name, host, .. } = slot;
    if slot.wal_status.is_none() && slot.restart_lsn.is_none() {
        return format!("slot {name} on {host}: keeps NO WAL, or does not exist");
    }
    if slot.wal_status.as_deref() == Some("lost") {
        return format!("slot {name} on {host}: has LOST WAL (max_slot_wal_keep_size)");
    }
    let held = slot.retained_bytes.map_or_else(|| "no".into(), output::bytes);
    let limit = match (slot.limit_bytes, slot.seconds_until_limit) {
        (None, _) => "no limit".into(),
        (Some(limit), None) => format!("limit {}", output::bytes(limit)),
        (Some(limit), Some(left)) => format!(
            "limit {}, reached in {} if no WAL were archived",
            output::bytes(limit),
            output::duration(Duration::from_secs(left))
        ),
    };
    format!("slot {name} on {host}: keeps {held} of WAL, {limit}")
}

/// What the regions hold.
fn print_archive(report: &StatusReport) {
    let unknown = || "unknown".to_owned();
    match &report.recovery_window {
        Some(window) => output::line(&format!(
            "recovery window: {} ({}) to {} ({})",
            window.earliest_time.format("%Y-%m-%d %H:%M:%S UTC"),
            window.earliest_lsn,
            window
                .latest_time
                .map_or_else(unknown, |t| t.format("%Y-%m-%d %H:%M:%S UTC").to_string()),
            window.latest_lsn,
        )),
        None => output::line("recovery window: NONE: nothing can be restored yet"),
    }
    for gap in &report.gaps {
        output::line(&format!("GAP on timeline {} from {} to {}", gap.timeline, gap.from, gap.to));
    }
    match &report.last_backup {
        Some(backup) => output::line(&format!(
            "last backup: {} ({}) in {}",
            backup.label,
            backup.stop_time.format("%Y-%m-%d %H:%M:%S UTC"),
            backup.regions.join(", ")
        )),
        None => output::line("last backup: NONE"),
    }
    print_backups(report);
    let met = |met: Option<bool>| match met {
        Some(true) => "met",
        Some(false) => "NOT MET",
        None => "not measured",
    };
    let objectives = &report.objectives;
    output::line(&format!(
        "objectives: RPO {} {}, RTO {} {}",
        output::duration(Duration::from_secs(objectives.rpo_seconds)),
        met(objectives.rpo_met),
        output::duration(Duration::from_secs(objectives.rto_seconds)),
        met(objectives.rto_met),
    ));
}

/// What the sidecar does about backups by itself.
fn print_backups(report: &StatusReport) {
    let time = |time: DateTime<Utc>| time.format("%Y-%m-%d %H:%M:%S UTC").to_string();
    if let Some(attempt) = &report.last_attempt {
        let outcome = match (&attempt.label, &attempt.error) {
            (_, Some(error)) => format!("FAILED: {error}"),
            (Some(label), None) => format!("{label} was taken"),
            (None, None) => "nothing".to_owned(),
        };
        output::line(&format!(
            "last {} backup of this sidecar, {}: {outcome}",
            attempt.kind,
            time(attempt.time)
        ));
    }
    if let Some(next) = &report.next_backup {
        let overdue = if next.time < report.time { ", overdue" } else { "" };
        output::line(&format!("next backup: {} ({}{overdue})", next.kind, time(next.time)));
    }
}
