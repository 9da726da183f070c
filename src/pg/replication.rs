//! Replication commands with typed answers (PostgreSQL documentation, "Streaming Replication
//! Protocol"; `src/backend/replication/repl_gram.y`).

use bytes::Bytes;

use super::{Connection, PgError};
use crate::wal::{Lsn, TimelineId};

/// The answer to IDENTIFY_SYSTEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentifySystem {
    /// The cluster's system identifier.
    pub system_id: u64,
    /// The timeline that the server is on.
    pub timeline: TimelineId,
    /// The end of its flushed WAL.
    pub flushed: Lsn,
}

/// What the server says at the end of a timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NextTimeline {
    /// The timeline that follows; not always the next number.
    pub timeline: TimelineId,
    /// Where it branched off.
    pub switch_point: Lsn,
}

/// Puts an identifier into double quotes.
pub(super) fn quote_identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Puts a text into single quotes.
pub(super) fn quote_literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// The text in a column of a row.
pub(super) fn text(row: &[Option<Bytes>], column: usize) -> Result<String, PgError> {
    let value = row
        .get(column)
        .and_then(Option::as_ref)
        .ok_or_else(|| PgError::Protocol(format!("an answer without column {column}")))?;
    Ok(String::from_utf8_lossy(value).into_owned())
}

fn parsed<T: std::str::FromStr>(row: &[Option<Bytes>], column: usize) -> Result<T, PgError> {
    let value = text(row, column)?;
    value.parse().map_err(|_| PgError::Protocol(format!("{value:?} in column {column}")))
}

impl NextTimeline {
    pub(super) fn from_row(row: &[Option<Bytes>]) -> Result<NextTimeline, PgError> {
        Ok(NextTimeline { timeline: TimelineId(parsed(row, 0)?), switch_point: parsed(row, 1)? })
    }
}

impl Connection {
    /// IDENTIFY_SYSTEM.
    ///
    /// # Errors
    /// When the server refuses it or the connection breaks.
    pub async fn identify_system(&mut self) -> Result<IdentifySystem, PgError> {
        let rows = self.query("IDENTIFY_SYSTEM").await?;
        let row = rows.first().ok_or_else(|| PgError::Protocol("no system".into()))?;
        Ok(IdentifySystem {
            system_id: parsed(row, 0)?,
            timeline: TimelineId(parsed(row, 1)?),
            flushed: parsed(row, 2)?,
        })
    }

    /// SHOW.
    ///
    /// # Errors
    /// When the setting does not exist or the connection breaks.
    pub async fn show(&mut self, setting: &str) -> Result<String, PgError> {
        let rows = self.query(&format!("SHOW {setting}")).await?;
        text(rows.first().map_or(&[], Vec::as_slice), 0)
    }

    /// TIMELINE_HISTORY: the bytes of the history file, or `None` when the server has none.
    ///
    /// # Errors
    /// When the connection breaks.
    pub async fn timeline_history(
        &mut self,
        timeline: TimelineId,
    ) -> Result<Option<Bytes>, PgError> {
        match self.query(&format!("TIMELINE_HISTORY {timeline}")).await {
            Ok(rows) => Ok(rows.first().and_then(|row| row.get(1)).and_then(Clone::clone)),
            // undefined_file: this server never was on that timeline.
            Err(PgError::Server(error)) if error.code == "58P01" => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// CREATE_REPLICATION_SLOT … PHYSICAL RESERVE_WAL. A slot that exists is no error.
    ///
    /// # Errors
    /// When the server refuses it or the connection breaks.
    pub async fn create_slot(&mut self, slot: &str) -> Result<(), PgError> {
        let name = quote_identifier(slot);
        // 15 introduced a list of options and still takes the old words.
        match self.query(&format!("CREATE_REPLICATION_SLOT {name} PHYSICAL RESERVE_WAL")).await {
            Ok(_) => Ok(()),
            Err(PgError::Server(error)) if error.code == "42710" => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// DROP_REPLICATION_SLOT.
    ///
    /// # Errors
    /// When the slot is in use or does not exist, or the connection breaks.
    pub async fn drop_slot(&mut self, slot: &str) -> Result<(), PgError> {
        self.query(&format!("DROP_REPLICATION_SLOT {}", quote_identifier(slot))).await.map(|_| ())
    }
}
