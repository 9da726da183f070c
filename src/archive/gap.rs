//! WAL that the server has removed before it was archived: fetched from any other host that still
//! has it; what nobody has is recorded, and no restore crosses it (invariant I7).
//!
//! A gap is recorded only when every region and every host could be asked. A host that stays silent
//! is waited for a while; a region that does is not waited for: the others take what the server
//! still has, and the hole stays open until it can tell.

use std::time::Duration;

use futures_util::future::join_all;

use super::ArchiveError;
use super::cutter::piece_unit;
use super::session::{Server, Session, Stretch};
use super::start::{StartPoint, find_start};
use super::timelines::read_histories;
use crate::pg::{HostSpec, PgError};
use crate::repo::{FORMAT_VERSION, Gap, gap_key};
use crate::store::{ask_all, list_pieces};
use crate::wal::{Lsn, SegmentName, SegmentSize, TimelineId};

/// How long hosts that do not answer may keep a gap from being recorded.
const HOST_PATIENCE: Duration = Duration::from_secs(60);
/// How long a host may take to tell what WAL it has.
const ASK_PATIENCE: Duration = Duration::from_secs(15);

/// What a host says about a timeline's WAL.
struct Holding {
    host: HostSpec,
    /// Where its oldest WAL begins; `None` when it may not tell.
    oldest: Result<Option<Lsn>, PgError>,
}

impl Session<'_> {
    /// The server has removed WAL that the archive lacks.
    ///
    /// # Errors
    /// When nothing could be done about it yet.
    pub(super) async fn meet_removed(
        &self,
        server: &Server,
        stretch: &Stretch,
        reason: &str,
    ) -> Result<(), ArchiveError> {
        let lookup = find_start(&server.regions, &server.history, &server.format).await?;
        let point = lookup.point.unwrap_or_else(|| stretch.point.clone());
        let (timeline, from) = (point.timeline, point.frontier);
        let since = self.memory.removed_since(timeline, from);
        let holdings = self.ask_hosts(server, timeline).await;
        let unit = piece_unit(&server.format);
        let own = holdings
            .iter()
            .find(|holding| holding.host == server.host)
            .and_then(|holding| holding.oldest.as_ref().ok().copied().flatten());
        let on_current = timeline == server.identity.timeline;
        let kept = server.restart_lsn.filter(|_| on_current).map(|lsn| lsn.round_down(unit));
        let end = server.history.end_of(timeline).flatten();
        let own = own.or(kept).or(end).unwrap_or(server.identity.flushed.round_down(unit));
        for holding in holdings.iter().filter(|holding| holding.host != server.host) {
            let may_have = match &holding.oldest {
                Ok(oldest) => oldest.is_none_or(|oldest| oldest <= from.round_down(unit)),
                Err(_) => false,
            };
            if may_have && self.fetch_from(&holding.host, server, &point, own).await {
                return Ok(());
            }
        }
        let told = holdings.iter().filter_map(|holding| holding.oldest.as_ref().ok()?.as_ref());
        let next = told.copied().filter(|oldest| *oldest > from).chain([own]).min();
        let to = end.map_or(next.unwrap_or(own), |end| end.min(next.unwrap_or(own)));
        if to <= from {
            return Err(ArchiveError::Removed { timeline, from });
        }
        if !lookup.unread.is_empty() {
            let silent: Vec<_> = lookup.unread.iter().map(ToString::to_string).collect();
            let alarm = format!(
                "WAL from {from} to {to} on timeline {timeline} is gone from the servers, and a region that may have it is silent: going on behind it ({})",
                silent.join("; ")
            );
            if self.state.alarm(alarm.clone()) {
                tracing::error!("{alarm}");
            }
            // At a fork the next timeline goes on.
            let next = server.history.after(timeline).filter(|_| end == Some(to));
            self.memory.skip_to(next.unwrap_or(timeline), to.round_down(unit));
            return Ok(());
        }
        let silent = holdings.iter().find_map(|holding| holding.oldest.as_ref().err());
        if let Some(silent) = silent
            && since.elapsed() < HOST_PATIENCE
        {
            tracing::warn!("before a gap is recorded every host is asked: {silent}");
            return Err(ArchiveError::Removed { timeline, from });
        }
        // A region may have WAL behind the hole: it is not lost.
        let to = self.stored_behind(server, timeline, from, to).await.unwrap_or(to);
        self.record_gap(server, (timeline, from, to), reason).await
    }

    /// Where the first WAL behind `from` begins that any region has, before `to`.
    async fn stored_behind(
        &self,
        server: &Server,
        timeline: TimelineId,
        from: Lsn,
        to: Lsn,
    ) -> Option<Lsn> {
        let size = server.format.segment_size;
        let lists = ask_all(&server.regions, |region| async move {
            list_pieces(&region, timeline, size, from, Some(to)).await
        });
        let lists: Vec<_> = lists.await.into_iter().flatten().collect();
        let starts = lists.iter().flat_map(|list| list.coverage.pieces());
        starts.filter_map(|piece| piece.start(size)).filter(|start| *start > from).min()
    }

    /// Asks every host of the connection string where its WAL begins.
    async fn ask_hosts(&self, server: &Server, timeline: TimelineId) -> Vec<Holding> {
        let mut hosts = self.connector.conninfo().hosts.clone();
        if !hosts.contains(&server.host) {
            hosts.push(server.host.clone());
        }
        let asked = hosts.into_iter().map(|host| async {
            let ask = async {
                let sql = self.connector.sql(&host).await?;
                // Segments that were recycled for later use have later names.
                let oldest = sql
                    .value(&format!(
                        "SELECT min(name) FROM pg_ls_waldir() WHERE name ~ '^{}[0-9A-F]{{16}}$'",
                        timeline.to_hex8()
                    ))
                    .await;
                match oldest {
                    Ok(name) => {
                        Ok(name.and_then(|name| start_of(&name, server.format.segment_size)))
                    }
                    // Not a member of pg_monitor.
                    Err(error) if error.code() == Some("42501") => Ok(None),
                    Err(error) => Err(error),
                }
            };
            let oldest = tokio::time::timeout(ASK_PATIENCE, ask)
                .await
                .unwrap_or(Err(PgError::Timeout("asking a host for its WAL")));
            Holding { host, oldest }
        });
        join_all(asked).await
    }

    /// Streams what is missing from another host; whether that moved the archive on.
    async fn fetch_from(
        &self,
        host: &HostSpec,
        server: &Server,
        point: &StartPoint,
        until: Lsn,
    ) -> bool {
        match self.try_fetch(host, server, point, until).await {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!("{host} cannot give WAL from {}: {error}", point.frontier);
                false
            }
        }
    }

    async fn try_fetch(
        &self,
        host: &HostSpec,
        server: &Server,
        point: &StartPoint,
        until: Lsn,
    ) -> Result<(), ArchiveError> {
        let mut connection = self.connector.connect_any_role(host, &[]).await?;
        let identity = connection.identify_system().await?;
        if identity.system_id != server.identity.system_id {
            let problem = format!("its system identifier is {}", identity.system_id);
            return Err(PgError::Protocol(problem).into());
        }
        let (history, _) = read_histories(&mut connection, identity.timeline).await?;
        let reach = match history.end_of(point.timeline) {
            Some(end) => end.unwrap_or(identity.flushed),
            None => Lsn::INVALID,
        };
        if reach <= point.frontier {
            let problem = format!("on timeline {} it has WAL up to {reach} only", point.timeline);
            return Err(PgError::Protocol(problem).into());
        }
        tracing::warn!(
            "the primary has removed WAL from {}: fetching it from {host}",
            point.frontier
        );
        let until = Some(until.min(reach));
        let stretch = Stretch { point: point.clone(), slot: None, until };
        let outcome = self.stream(connection, server, &stretch).await;
        self.state.end(None);
        outcome.map(drop)
    }

    async fn record_gap(
        &self,
        server: &Server,
        (timeline, from, to): (TimelineId, Lsn, Lsn),
        reason: &str,
    ) -> Result<(), ArchiveError> {
        let noticed = chrono::Utc::now();
        let reason = reason.to_owned();
        let gap = Gap { format: FORMAT_VERSION, timeline, from, to, noticed, reason };
        let bytes = serde_json::to_vec_pretty(&gap).map_err(std::io::Error::from)?;
        let key = gap_key(timeline, from, to);
        let (key, bytes) = (&key, &bytes::Bytes::from(bytes));
        let writes =
            ask_all(&server.regions, |region| async move { region.put(key, bytes.clone()).await });
        let failures: Vec<_> = writes.await.into_iter().filter_map(Result::err).collect();
        if failures.len() == server.regions.len() {
            return Err(ArchiveError::NoRegion(failures));
        }
        for failure in failures {
            tracing::warn!("the gap is not recorded everywhere yet: {failure}");
        }
        tracing::error!(%timeline, %from, %to, "GAP: this WAL is lost for the archive; no restore can cross it");
        self.state.alarm(format!(
            "gap on timeline {timeline} from {from} to {to}: restores cannot cross it; a base backup taken since then makes the later moments reachable"
        ));
        self.state.gap_recorded();
        Ok(())
    }
}

/// Where the segment of a file in `pg_wal` begins.
fn start_of(file_name: &str, size: SegmentSize) -> Option<Lsn> {
    let name: SegmentName = file_name.parse().ok()?;
    size.number(name).map(|number| size.start_of(number))
}
