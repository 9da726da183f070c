//! `pgkeep run`: the sidecar.

use clap::Args as ClapArgs;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::context::{Context, conninfo, open_regions};
use super::{CliError, Exit};
use crate::archive::{ArchiveSettings, Archiver};
use crate::backup::{BackupRequest, BackupTurns, Schedules, back_up_after_gaps, keep_schedule};
use crate::config::{Config, OnGap};
use crate::pg::{Connector, SlotWatch};
use crate::repo::BackupType;
use crate::serve::{Objectives, Service};
use crate::store::Regions;

/// Arguments of `run`.
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// Accept a server with another system identifier than the archive's: after pg_upgrade
    #[arg(long)]
    new_lineage: bool,
    /// Archive a server that takes writes on an older timeline than the archive's newest: after
    /// going back to an old primary on purpose
    #[arg(long)]
    accept_timeline: bool,
    /// Fill a region that is empty although the others are not
    #[arg(long, value_name = "NAME")]
    new_region: Vec<String>,
}

/// Runs until SIGTERM or SIGINT; the last WAL is stored first.
pub async fn run(context: &Context, args: Args) -> Result<Exit, CliError> {
    let config = context.load()?;
    let regions = open_regions(&config, &[])?;
    let mut settings = ArchiveSettings::new(&config.cluster, &config.wal);
    settings.new_lineage = args.new_lineage;
    settings.accept_timeline = args.accept_timeline;
    settings.new_regions = args.new_region;
    let connector = Connector::new(conninfo(&config)?);
    let archiver = Archiver::new(settings.clone(), connector.clone(), &regions);
    let cancelled = CancellationToken::new();
    stop_on_signals(cancelled.clone())?;
    let turns = BackupTurns::default();
    let request = BackupRequest {
        connector: connector.clone(),
        archive: settings,
        has_archiver: true,
        kind: BackupType::Full,
        on_checksum_failure: config.backup.on_checksum_failure,
        compression_level: config.backup.compression_level,
        max_rate: config.backup.max_rate_kilobytes(),
        spread_checkpoint: false,
        wal_timeout: config.backup.wal_timeout.0,
        include: config.backup.include.clone(),
    };
    take_backups(&config, &archiver, &request, &regions, &turns, &cancelled);
    if !config.http.listen.is_empty() {
        let service = Service {
            cluster: config.cluster.name.clone(),
            regions: regions.within(&config.cluster.name),
            archive: archiver.state(),
            turns,
            connector,
            slot: config.cluster.slot.clone(),
            slot_watch: SlotWatch::default(),
            objectives: Objectives { rpo: config.objectives.rpo.0, rto: config.objectives.rto.0 },
        };
        tokio::spawn(service.run(config.http.listen.clone(), cancelled.clone()));
    }
    archiver.run(&cancelled).await?;
    tracing::info!("stopped");
    Ok(Exit::Done)
}

/// Starts what takes backups by itself: after gaps, and by the clock.
fn take_backups(
    config: &Config,
    archiver: &Archiver,
    request: &BackupRequest,
    regions: &Regions,
    turns: &BackupTurns,
    cancelled: &CancellationToken,
) {
    if config.wal.on_gap == OnGap::Backup {
        tokio::spawn(back_up_after_gaps(
            archiver.state(),
            request.clone(),
            regions.clone(),
            turns.clone(),
            cancelled.clone(),
        ));
    }
    let schedules = Schedules::new(&config.backup);
    if !schedules.is_empty() {
        tokio::spawn(keep_schedule(
            schedules,
            archiver.state(),
            request.clone(),
            regions.clone(),
            turns.clone(),
            cancelled.clone(),
        ));
    }
}

/// The first signal stops in good order, the second at once.
fn stop_on_signals(cancelled: CancellationToken) -> Result<(), CliError> {
    let failed = |error: std::io::Error| CliError::new(Exit::Failed, error.to_string());
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    tokio::spawn(async move {
        for first in [true, false] {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if !first {
                tracing::warn!("stopping at once: WAL since the last flush stays on the server");
                std::process::exit(Exit::Failed as i32);
            }
            tracing::info!("stopping: storing the last WAL");
            cancelled.cancel();
        }
    });
    Ok(())
}
