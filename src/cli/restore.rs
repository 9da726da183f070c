//! `pgkeep restore`: a data directory at any moment.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args as ClapArgs;
use serde::Serialize;

use super::context::{Context, catalog, open_readable};
use super::include::{IncludeArgs, IncludeReport};
use super::{CliError, Exit, include, output};
use crate::backup::Progress;
use crate::repo::BackupLabel;
use crate::restore::{
    IncludeOutcome, Plan, PlanRequest, PreparedInclude, RestoreOptions, Restored, TablespaceMap,
    Target, TargetAction, TimelineChoice, interrupted_backup, make_plan, parse_time,
    parse_timeline, restore,
};
use crate::store::{Catalog, Damage};
use crate::wal::Lsn;

/// Arguments of `restore`.
#[derive(Debug, ClapArgs)]
#[command(group(clap::ArgGroup::new("target").multiple(false)))]
pub struct Args {
    /// The data directory to make; it must be empty or not exist, but for --delta. A restore that
    /// was interrupted is ended by the same command
    #[arg(long, value_name = "DIR", required_unless_present = "include_only")]
    pgdata: Option<PathBuf>,
    /// Restore over a data directory of the same cluster: what is right on disk is kept, what differs
    /// is rewritten, and what does not belong is removed
    #[arg(long)]
    delta: bool,
    /// Recover to a moment, with its offset from UTC: "2026-11-23 14:05:00+01:00"
    #[arg(long, group = "target", value_name = "TIME", value_parser = parse_time)]
    target_time: Option<chrono::DateTime<chrono::Utc>>,
    /// Recover to a position in the WAL
    #[arg(long, group = "target", value_name = "LSN")]
    target_lsn: Option<Lsn>,
    /// Recover to the end of a transaction
    #[arg(long, group = "target", value_name = "XID")]
    target_xid: Option<u32>,
    /// Recover to a named restore point
    #[arg(long, group = "target", value_name = "NAME")]
    target_name: Option<String>,
    /// Recover to the end of the backup
    #[arg(long, group = "target")]
    target_immediate: bool,
    /// Stop just before the target instead of just after it
    #[arg(long, requires = "target")]
    exclusive: bool,
    /// The history to follow: "latest", "current" (the backup's) or a number
    #[arg(long, value_name = "TIMELINE", default_value = "latest", value_parser = parse_timeline)]
    target_timeline: TimelineChoice,
    /// What PostgreSQL does at the target
    #[arg(long, value_enum, default_value = "promote")]
    target_action: TargetAction,
    /// The backup to begin with [default: the newest one that serves]
    #[arg(long, value_name = "LABEL")]
    backup: Option<BackupLabel>,
    /// Read only from this region; may be given again
    #[arg(long, value_name = "NAME")]
    region: Vec<String>,
    /// The system identifier, when the archive holds several
    #[arg(long, value_name = "ID")]
    lineage: Option<u64>,
    /// Put a tablespace elsewhere; may be given again
    #[arg(long, value_name = "OLD=NEW", value_parser = parse_map)]
    tablespace_map: Vec<TablespaceMap>,
    /// Reads at once [default: 2 a core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=128))]
    jobs: Option<u16>,
    /// Leave archive_mode as the origin had it: the copy may then archive into its origin
    #[arg(long)]
    keep_archive_mode: bool,
    /// Do not verify the WAL in advance: damage is then found only when recovery comes to it
    #[arg(long)]
    skip_wal_check: bool,
    #[command(flatten)]
    include: IncludeArgs,
    /// Print the plan and touch nothing
    #[arg(long)]
    dry_run: bool,
    /// Print the plan and the outcome as JSON
    #[arg(long)]
    json: bool,
}

fn parse_map(text: &str) -> Result<TablespaceMap, String> {
    let (old, new) = text.split_once('=').ok_or("write OLD=NEW")?;
    Ok(TablespaceMap { old: old.to_owned(), new: PathBuf::from(new) })
}

#[derive(Serialize)]
struct Report<'a> {
    plan: &'a Plan,
    end_lsn: Lsn,
    timeline: u32,
    restored: bool,
    seconds: Option<f64>,
    kept_bytes: Option<u64>,
    fetched_bytes: Option<u64>,
    removed_files: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    include: Option<IncludeReport>,
    damaged_objects: Vec<String>,
}

impl Args {
    fn target(&self) -> Target {
        if let Some(time) = self.target_time {
            return Target::Time(time);
        }
        if let Some(lsn) = self.target_lsn {
            return Target::Lsn(lsn);
        }
        if let Some(xid) = self.target_xid {
            return Target::Xid(xid);
        }
        if let Some(name) = &self.target_name {
            return Target::Name(name.clone());
        }
        if self.target_immediate { Target::Immediate } else { Target::End }
    }
}

/// Plans, and unless it is a dry run, restores.
pub async fn run(context: &Context, args: Args) -> Result<Exit, CliError> {
    let config_file = std::path::absolute(context.config_file()?)
        .map_err(|error| CliError::new(Exit::Failed, error.to_string()))?;
    let config = context.load()?;
    let regions = open_readable(&config, &args.region)?;
    let catalog = catalog(&config, &regions, args.lineage).await?;
    let Some(pgdata) = args.pgdata.clone() else {
        return run_without_database(&catalog, &args).await;
    };
    let request = PlanRequest {
        target: args.target(),
        exclusive: args.exclusive,
        timeline: args.target_timeline,
        backup: args.backup.clone().or_else(|| begun_with(&catalog, &args, &pgdata)),
        regions: args.region.clone(),
    };
    let plan = make_plan(&catalog, &request).await?;
    tell_plan(&plan);
    let keep_out = folders_of(&catalog, &plan, &args, &pgdata);
    let prepared = args.include.prepare(&catalog, &plan.backup, keep_out).await?;
    let root = prepared.as_ref().map(|prepared| prepared.root().to_owned());
    let included = |outcome| include::report(&catalog, &plan.backup, root.as_deref()?, outcome);
    if args.dry_run {
        if args.json {
            report(&plan, None, included(None))?;
        }
        return Ok(Exit::Done);
    }
    let program = std::env::current_exe()
        .map_err(|error| CliError::new(Exit::Failed, format!("where is this program? {error}")))?;
    let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    let options = RestoreOptions {
        pgdata: pgdata.clone(),
        delta: args.delta,
        tablespaces: args.tablespace_map.clone(),
        jobs: args.jobs.map_or(2 * cores, usize::from),
        action: args.target_action,
        program,
        config: config_file,
        keep_archive_mode: args.keep_archive_mode,
        check_wal: !args.skip_wal_check,
    };
    let progress = Arc::new(Progress::default());
    let shown = output::show_progress("restore", &progress);
    let outcome = restore(&catalog, &plan, &options, &progress).await;
    drop(shown);
    let restored = outcome.inspect_err(|_| {
        for damage in catalog.regions.damage() {
            tell_damage(&damage);
        }
    })?;
    let written = match prepared {
        Some(prepared) => Some(write_captured(prepared, &plan).await?),
        None => None,
    };
    tell_outcome(&restored, &pgdata);
    if args.json {
        report(&plan, Some(&restored), included(written))?;
    }
    Ok(Exit::Done)
}

/// Writes captured files beside a database that is whole already.
async fn write_captured(
    prepared: PreparedInclude,
    plan: &Plan,
) -> Result<IncludeOutcome, CliError> {
    include::write(prepared).await.map_err(|error| {
        let message =
            format!("the database is restored, captured files are not: {}", error.message);
        CliError::new(error.exit, message).hint(format!(
            "\"pgkeep restore --include-only --backup {}\" with the same --include options goes on",
            plan.backup
        ))
    })
}

/// Brings captured files alone.
async fn run_without_database(catalog: &Catalog, args: &Args) -> Result<Exit, CliError> {
    let label = args.include.choose(catalog, args.backup.as_ref())?;
    output::note(&format!("backup:   {label}"));
    let Some(prepared) = args.include.prepare(catalog, label, Vec::new()).await? else {
        return Ok(Exit::Done);
    };
    let root = prepared.root().to_owned();
    let written = match args.dry_run {
        true => None,
        false => Some(include::write(prepared).await?),
    };
    for damage in catalog.regions.damage() {
        tell_damage(&damage);
    }
    if args.json {
        output::json(&include::report(catalog, label, &root, written))?;
    }
    Ok(Exit::Done)
}

/// The database's own folders.
fn folders_of(catalog: &Catalog, plan: &Plan, args: &Args, pgdata: &Path) -> Vec<PathBuf> {
    let backup = catalog.backups.get(&plan.backup);
    let spaces = backup.into_iter().flat_map(|(info, _)| &info.tablespaces).map(|space| {
        let mapped = args.tablespace_map.iter().find(|entry| entry.old == space.location);
        mapped.map_or_else(|| PathBuf::from(&space.location), |entry| entry.new.clone())
    });
    std::iter::once(pgdata.to_owned()).chain(spaces).collect()
}

/// The backup with which an interrupted restore to the same target began, as long as it is there.
fn begun_with(catalog: &Catalog, args: &Args, pgdata: &Path) -> Option<BackupLabel> {
    interrupted_backup(pgdata, &args.target(), args.exclusive)
        .filter(|label| catalog.backups.contains_key(label))
}

fn report(
    plan: &Plan,
    restored: Option<&Restored>,
    include: Option<IncludeReport>,
) -> Result<(), CliError> {
    let damage = restored.map(|restored| restored.damage.as_slice()).unwrap_or_default();
    output::json(&Report {
        plan,
        end_lsn: plan.end(),
        timeline: plan.timeline().0,
        restored: restored.is_some(),
        seconds: restored.map(|restored| restored.elapsed.as_secs_f64()),
        kept_bytes: restored.map(|restored| restored.kept),
        fetched_bytes: restored.map(|restored| restored.fetched),
        removed_files: restored.map(|restored| restored.removed),
        include,
        damaged_objects: damage.iter().map(|d| format!("{}: {}", d.region, d.key)).collect(),
    })
}

fn tell_plan(plan: &Plan) {
    output::note(&format!(
        "target:   {}{}",
        plan.target,
        if plan.exclusive { ", exclusive" } else { "" }
    ));
    if plan.recovery_target != plan.target {
        output::note("          no transaction ended after it: that is the end of the archive");
    }
    output::note(&format!(
        "backup:   {} ({}), from {}",
        plan.backup,
        plan.reason,
        plan.backup_regions.join(", ")
    ));
    let path: Vec<String> = plan
        .path
        .iter()
        .map(|part| format!("timeline {} from {} to {}", part.timeline, part.begin, part.end))
        .collect();
    output::note(&format!("WAL:      {}", path.join(", then ")));
    output::note(&format!(
        "to fetch: {} of backup for {} of data, at most {} of WAL",
        output::bytes(plan.backup_bytes),
        output::bytes(plan.data_bytes),
        output::bytes(plan.wal_bytes)
    ));
    if let Some(moment) = plan.reaches {
        output::note(&format!("reaches:  {}", moment.format("%Y-%m-%d %H:%M:%S%.6f UTC")));
    }
}

fn tell_damage(damage: &Damage) {
    output::note(&format!(
        "damaged object in region {}: {} ({})",
        damage.region, damage.key, damage.message
    ));
}

fn tell_outcome(restored: &Restored, pgdata: &Path) {
    let rate = restored.bytes as f64 / restored.elapsed.as_secs_f64().max(0.001);
    output::note(&format!(
        "restored {} in {} ({}/s)",
        output::bytes(restored.bytes),
        output::duration(Duration::from_secs_f64(restored.elapsed.as_secs_f64())),
        output::bytes(rate as u64)
    ));
    if restored.kept > 0 || restored.removed > 0 {
        output::note(&format!(
            "{} of it were on disk already, {} were read; {} that did not belong there {} removed",
            output::bytes(restored.kept),
            output::bytes(restored.fetched),
            match restored.removed {
                1 => "1 file".to_owned(),
                number => format!("{number} files"),
            },
            if restored.removed == 1 { "was" } else { "were" }
        ));
    }
    for damage in &restored.damage {
        tell_damage(damage);
    }
    output::note(&format!(
        "now start PostgreSQL, which recovers by itself: pg_ctl -D {} start",
        pgdata.display()
    ));
}
