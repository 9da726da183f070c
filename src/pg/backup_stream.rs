//! BASE_BACKUP as a stream of tar archives (`src/backend/backup/basebackup.c`).
//!
//! Two protocols under one type:
//! - 13 and 14 (`REL_14_STABLE:src/backend/replication/basebackup.c`): one CopyOut for each
//!   tablespace, in the order of the list that comes first, then one for the manifest.
//! - 15 on (`basebackup_copy.c`): one CopyOut whose messages begin with a letter: `n` new archive
//!   (name, then tablespace path, both zero-terminated), `m` manifest, `d` data, `p` progress.
//!
//! In both: a result set with the start LSN, one with the tablespaces, the copies, one with the
//! stop LSN. Checksum failures come as warnings, and as an error after all of that.

use bytes::{Buf, Bytes, BytesMut};
use postgres_protocol::message::frontend::{self, CopyData};

use super::message::Incoming;
use super::replication::{quote_literal, text};
use super::{Connection, PgError, ServerError};
use crate::wal::{Lsn, TimelineId};

/// What is asked of the server.
#[derive(Clone, Debug, Default)]
pub struct BackupOptions {
    /// Shown in `backup_label`.
    pub label: String,
    /// Kilobytes a second at most.
    pub max_rate: Option<u32>,
    /// Wait for the next scheduled checkpoint instead of asking for one now.
    pub spread_checkpoint: bool,
    /// Only the blocks that changed since the backup whose manifest was uploaded (17 and newer).
    pub incremental: bool,
}

/// A tablespace in the server's list; the data directory itself has no OID.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupTablespace {
    /// Its OID.
    pub oid: Option<u32>,
    /// Where it lies on the server.
    pub location: Option<String>,
    /// Its size in bytes, as the server estimated it.
    pub size: Option<u64>,
}

/// Something in the stream.
#[derive(Debug)]
pub enum BackupEvent {
    /// A tar archive begins: of the tablespace with this OID, or of the data directory.
    Archive(Option<u32>),
    /// The backup manifest begins.
    Manifest,
    /// Bytes of what began last.
    Data(Bytes),
    /// A warning: a page with a wrong checksum, or another.
    Warning(ServerError),
    /// It is over.
    End {
        /// Where the backup ends in the WAL.
        stop: Lsn,
        /// The server found wrong checksums and says so once more.
        checksum_error: Option<ServerError>,
    },
}

/// A running backup.
pub struct BackupStream {
    connection: Connection,
    tagged: bool,
    copies: usize,
    start: Lsn,
    timeline: TimelineId,
    tablespaces: Vec<BackupTablespace>,
}

impl Connection {
    /// UPLOAD_MANIFEST (17 and newer): the manifest of the backup that an incremental one builds on.
    /// The server then takes parts of it, and looks at them at the end.
    ///
    /// # Errors
    /// When the server refuses it or the connection breaks.
    pub async fn begin_manifest(&mut self) -> Result<(), PgError> {
        self.send_query("UPLOAD_MANIFEST").await?;
        loop {
            match self.receive().await? {
                Incoming::CopyIn => return Ok(()),
                Incoming::Error(error) => return Err(PgError::Server(error)),
                Incoming::Ready => return Err(PgError::Protocol("UPLOAD_MANIFEST".into())),
                _ => {}
            }
        }
    }

    /// The next part of the manifest.
    ///
    /// # Errors
    /// When the connection breaks.
    pub async fn put_manifest(&mut self, part: &[u8]) -> Result<(), PgError> {
        let mut output = BytesMut::with_capacity(part.len() + 8);
        CopyData::new(part)
            .map_err(|error| PgError::Protocol(error.to_string()))?
            .write(&mut output);
        self.send(&output).await
    }

    /// The manifest is complete.
    ///
    /// # Errors
    /// When the server cannot read it or the connection breaks.
    pub async fn end_manifest(&mut self) -> Result<(), PgError> {
        let mut output = BytesMut::new();
        frontend::copy_done(&mut output);
        self.send(&output).await?;
        let mut failure = None;
        loop {
            match self.receive().await? {
                Incoming::Error(error) => failure = Some(PgError::Server(error)),
                Incoming::Ready => return failure.map_or(Ok(()), Err),
                _ => {}
            }
        }
    }

    /// BASE_BACKUP. Returns once the server is about to send files.
    ///
    /// # Errors
    /// When the server refuses it or the connection breaks.
    pub async fn base_backup(mut self, options: &BackupOptions) -> Result<BackupStream, PgError> {
        let tagged = self.major() >= 15;
        let sql = command(options, tagged);
        self.send_query(&sql).await?;
        let mut results = 0;
        let mut start = None;
        let mut tablespaces = Vec::new();
        while results < 2 {
            match self.receive().await? {
                Incoming::Row(row) if results == 0 => {
                    let lsn = text(&row, 0)?.parse();
                    let lsn = lsn.map_err(|error| PgError::Protocol(format!("{error}")))?;
                    let timeline = text(&row, 1)?.parse().map(TimelineId);
                    let timeline =
                        timeline.map_err(|error| PgError::Protocol(format!("{error}")))?;
                    start = Some((lsn, timeline));
                }
                Incoming::Row(row) => tablespaces.push(read_tablespace(&row)),
                Incoming::Complete => results += 1,
                Incoming::Error(error) => return Err(PgError::Server(error)),
                Incoming::Notice(notice) => tracing::info!("server: {notice}"),
                _ => {}
            }
        }
        let (start, timeline) = start.ok_or_else(|| PgError::Protocol("no start LSN".into()))?;
        Ok(BackupStream { connection: self, tagged, copies: 0, start, timeline, tablespaces })
    }
}

fn command(options: &BackupOptions, tagged: bool) -> String {
    let label = quote_literal(&options.label);
    if tagged {
        let checkpoint = if options.spread_checkpoint { "spread" } else { "fast" };
        let rate = options.max_rate.map_or(String::new(), |rate| format!(", MAX_RATE {rate}"));
        let incremental = if options.incremental { ", INCREMENTAL" } else { "" };
        return format!(
            "BASE_BACKUP (LABEL {label}, PROGRESS true, CHECKPOINT '{checkpoint}', WAL false, WAIT false, TABLESPACE_MAP true, MANIFEST 'yes', MANIFEST_CHECKSUMS 'CRC32C'{rate}{incremental})"
        );
    }
    let checkpoint = if options.spread_checkpoint { "" } else { " FAST" };
    let rate = options.max_rate.map_or(String::new(), |rate| format!(" MAX_RATE {rate}"));
    format!(
        "BASE_BACKUP LABEL {label} PROGRESS{checkpoint} NOWAIT{rate} TABLESPACE_MAP MANIFEST 'yes' MANIFEST_CHECKSUMS 'CRC32C'"
    )
}

fn read_tablespace(row: &[Option<Bytes>]) -> BackupTablespace {
    let column = |index: usize| text(row, index).ok();
    BackupTablespace {
        oid: column(0).and_then(|oid| oid.parse().ok()),
        location: column(1),
        // In KiB.
        size: column(2).and_then(|size| size.parse::<u64>().ok()).map(|size| size * 1024),
    }
}

impl BackupStream {
    /// Where recovery from this backup begins.
    pub fn start(&self) -> Lsn {
        self.start
    }

    /// The timeline on which it is taken.
    pub fn timeline(&self) -> TimelineId {
        self.timeline
    }

    /// All tablespaces, the data directory included.
    pub fn tablespaces(&self) -> &[BackupTablespace] {
        &self.tablespaces
    }

    /// The next event.
    ///
    /// # Errors
    /// When the server reports an error before the stop LSN or the connection breaks.
    pub async fn next(&mut self) -> Result<BackupEvent, PgError> {
        loop {
            match self.connection.receive().await? {
                Incoming::CopyOut if self.tagged => {}
                Incoming::CopyOut => {
                    let copy = self.copies;
                    self.copies += 1;
                    return Ok(match self.tablespaces.get(copy) {
                        Some(tablespace) => BackupEvent::Archive(tablespace.oid),
                        None => BackupEvent::Manifest,
                    });
                }
                Incoming::CopyData(payload) if !self.tagged => {
                    return Ok(BackupEvent::Data(payload));
                }
                Incoming::CopyData(payload) => {
                    if let Some(event) = read_tagged(payload)? {
                        return Ok(event);
                    }
                }
                Incoming::Row(row) => {
                    let stop = text(&row, 0)?.parse();
                    let stop = stop.map_err(|error| PgError::Protocol(format!("{error}")))?;
                    let checksum_error = self.drain().await?;
                    return Ok(BackupEvent::End { stop, checksum_error });
                }
                Incoming::Notice(notice) => return Ok(BackupEvent::Warning(notice)),
                Incoming::Error(error) => return Err(PgError::Server(error)),
                _ => {}
            }
        }
    }

    /// What follows the stop LSN. Only the verdict on checksums (ERRCODE_DATA_CORRUPTED) leaves
    /// the backup whole.
    async fn drain(&mut self) -> Result<Option<ServerError>, PgError> {
        let mut verdict = None;
        loop {
            match self.connection.receive().await? {
                Incoming::Ready => return Ok(verdict),
                Incoming::Error(error) if error.code == "XX001" => verdict = Some(error),
                Incoming::Error(error) => return Err(PgError::Server(error)),
                _ => {}
            }
        }
    }
}

fn read_tagged(mut payload: Bytes) -> Result<Option<BackupEvent>, PgError> {
    let bad = |what: &str| PgError::Protocol(format!("BASE_BACKUP: {what}"));
    if payload.is_empty() {
        return Err(bad("an empty message"));
    }
    match payload.get_u8() {
        b'd' => Ok(Some(BackupEvent::Data(payload))),
        b'm' => Ok(Some(BackupEvent::Manifest)),
        b'p' => Ok(None),
        b'n' => {
            let name = payload.split(|byte| *byte == 0).next().unwrap_or_default();
            let name = String::from_utf8_lossy(name);
            let stem = name.strip_suffix(".tar").ok_or_else(|| bad("an archive that is no tar"))?;
            if stem == "base" {
                return Ok(Some(BackupEvent::Archive(None)));
            }
            let oid = stem.parse().map_err(|_| bad("an archive with an unknown name"))?;
            Ok(Some(BackupEvent::Archive(Some(oid))))
        }
        other => Err(bad(&format!("a message of kind {other}"))),
    }
}
