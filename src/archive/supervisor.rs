//! Keeps a session running: reconnects with growing pauses, stops when told to.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::alive::{archiver_name, keep_saying};
use super::memory::Memory;
use super::session::{Session, SessionEnd};
use super::{ArchiveError, ArchiveSettings, ArchiveState};
use crate::pg::Connector;
use crate::store::Regions;

/// The pause after the first failure; it doubles up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// A hot spare looks this often whether the slot is free.
const SPARE_PAUSE: Duration = Duration::from_millis(500);
/// A session that lasted this long resets the pauses.
const GOOD_SESSION: Duration = Duration::from_secs(10);

/// Archives one cluster into its regions.
pub struct Archiver {
    settings: ArchiveSettings,
    connector: Connector,
    regions: Regions,
    state: ArchiveState,
    memory: Memory,
}

impl Archiver {
    /// An archiver; `regions` are at their roots.
    pub fn new(settings: ArchiveSettings, connector: Connector, regions: &Regions) -> Archiver {
        let names =
            regions.iter().map(|region| (region.name().to_owned(), region.url().to_owned()));
        let state = ArchiveState::new(settings.durability, settings.max_hold, names);
        let regions = regions.within(&settings.cluster);
        Archiver { settings, connector, regions, state, memory: Memory::default() }
    }

    /// What it knows of itself; stays valid while it runs.
    pub fn state(&self) -> ArchiveState {
        self.state.clone()
    }

    /// Runs until cancelled: the last WAL is then stored before it returns.
    ///
    /// # Errors
    /// What will not pass by itself: another cluster's archive, two histories, a server that does
    /// not let it in. Once it has streamed, only the first two end it.
    pub async fn run(&self, cancelled: &CancellationToken) -> Result<(), ArchiveError> {
        let mut pause = FIRST_PAUSE;
        let mut has_streamed = false;
        let mut last_trouble = String::new();
        while !cancelled.is_cancelled() {
            let began = Instant::now();
            let outcome = self.session(cancelled).await;
            // What this session streamed counts from the next one on: a clone streams, too, until its
            // WAL is compared.
            let was_there = has_streamed;
            has_streamed |= self.state.report().timeline.is_some();
            if began.elapsed() > GOOD_SESSION {
                pause = FIRST_PAUSE;
                last_trouble.clear();
            }
            let is_spare = matches!(&outcome, Err(error) if error.is_slot_in_use());
            let trouble = match outcome {
                Ok(SessionEnd::Cancelled) => return Ok(()),
                Ok(SessionEnd::ServerClosed) => "the server closed the connection".to_owned(),
                Err(error) if error.is_divergence() && !was_there => return Err(error),
                // The one that was there goes on, and says so.
                Err(error) if error.is_divergence() => {
                    self.state.alarm(error.to_string());
                    pause = LONGEST_PAUSE;
                    describe(&error)
                }
                Err(error) if !has_streamed && !error.is_transient() => return Err(error),
                Err(error) => describe(&error),
            };
            // Said once, not with every attempt.
            if trouble != last_trouble {
                tracing::warn!("{trouble}; trying again");
                last_trouble.clone_from(&trouble);
            }
            self.state.end(Some(trouble));
            if is_spare {
                self.state.wait_as_spare();
            }
            let wait = if is_spare { SPARE_PAUSE } else { pause };
            tokio::select! {
                () = tokio::time::sleep(crate::jitter::around(wait)) => {}
                () = cancelled.cancelled() => return Ok(()),
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        Ok(())
    }

    async fn session(&self, cancelled: &CancellationToken) -> Result<SessionEnd, ArchiveError> {
        let session = Session {
            settings: &self.settings,
            connector: &self.connector,
            cluster: &self.regions,
            state: &self.state,
            memory: &self.memory,
            cancelled,
        };
        self.state.begin_session();
        let quiet = CancellationToken::new();
        let alive = tokio::spawn(say_once_known(
            self.regions.clone(),
            archiver_name(&self.settings.slot),
            self.state.clone(),
            self.settings.alive_interval,
            quiet.clone(),
        ));
        // Told to stop before it streams: nothing has to be finished.
        let outcome = tokio::select! {
            outcome = session.run() => outcome,
            () = stopped_idle(&self.state, cancelled) => Ok(SessionEnd::Cancelled),
        };
        quiet.cancel();
        let _ = tokio::time::timeout(Duration::from_secs(5), alive).await;
        outcome
    }
}

/// Says the archiver's last word once the lineage is known.
async fn say_once_known(
    cluster: Regions,
    archiver: String,
    state: ArchiveState,
    interval: Duration,
    cancelled: CancellationToken,
) {
    loop {
        let system_id = state.report().system_id.filter(|_| state.has_streamed());
        if let Some(system_id) = system_id {
            let regions = cluster.within(&system_id.to_string()).iter().cloned().collect();
            return keep_saying(regions, archiver, state, interval, cancelled).await;
        }
        tokio::select! {
            () = cancelled.cancelled() => return,
            () = tokio::time::sleep(Duration::from_millis(100)) => {}
        }
    }
}

/// Waits until the archiver is told to stop while it is not streaming.
async fn stopped_idle(state: &ArchiveState, cancelled: &CancellationToken) {
    cancelled.cancelled().await;
    if state.report().streaming {
        std::future::pending::<()>().await;
    }
}

fn describe(error: &ArchiveError) -> String {
    match error {
        ArchiveError::Server(server) => match server.hint() {
            Some(hint) => format!("{server} ({hint})"),
            None => server.to_string(),
        },
        other => other.to_string(),
    }
}
