//! Messages from the server (PostgreSQL documentation, "Message Formats").
//!
//! Only what replication needs beyond postgres-protocol is read here: CopyBothResponse, which it
//! does not know, and CopyData, whose payload must not be copied.

use bytes::{Buf, Bytes, BytesMut};
use postgres_protocol::message::backend::{self, ErrorFields};

use super::{PgError, ServerError};

/// The longest message that is believed: base backup and WAL messages are far shorter.
const MAX_MESSAGE: usize = 1 << 30;

/// A message, as far as this client cares.
pub(super) enum Incoming {
    CopyData(Bytes),
    CopyDone,
    CopyBoth,
    CopyOut,
    CopyIn,
    Row(Vec<Option<Bytes>>),
    RowDescription,
    Complete,
    Ready,
    Error(ServerError),
    Notice(ServerError),
    Parameter(String, String),
    Other(backend::Message),
}

impl Incoming {
    /// Takes the first whole message from `buffer`. `None`: more bytes are needed, and room for
    /// them was made.
    pub(super) fn take(buffer: &mut BytesMut) -> Result<Option<Incoming>, PgError> {
        if buffer.len() < 5 {
            return Ok(None);
        }
        let tag = buffer[0];
        let length = (&buffer[1..5]).get_u32() as usize;
        if !(4..=MAX_MESSAGE).contains(&length) {
            return Err(PgError::Protocol(format!("a message of {length} bytes")));
        }
        if buffer.len() < length + 1 {
            buffer.reserve(length + 1 - buffer.len());
            return Ok(None);
        }
        let mut message = buffer.split_to(length + 1);
        Ok(Some(match tag {
            b'd' => {
                message.advance(5);
                Incoming::CopyData(message.freeze())
            }
            b'c' => Incoming::CopyDone,
            b'W' => Incoming::CopyBoth,
            b'H' => Incoming::CopyOut,
            b'G' => Incoming::CopyIn,
            b'T' => Incoming::RowDescription,
            b'D' => {
                message.advance(5);
                Incoming::Row(read_row(message.freeze())?)
            }
            b'C' => Incoming::Complete,
            b'Z' => Incoming::Ready,
            _ => parse_other(&mut message)?,
        }))
    }
}

fn parse_other(message: &mut BytesMut) -> Result<Incoming, PgError> {
    let parsed = backend::Message::parse(message)
        .map_err(|error| PgError::Protocol(error.to_string()))?
        .ok_or_else(|| PgError::Protocol("a message that is cut off".into()))?;
    Ok(match parsed {
        backend::Message::ErrorResponse(body) => Incoming::Error(read_error(body.fields())?),
        backend::Message::NoticeResponse(body) => Incoming::Notice(read_error(body.fields())?),
        backend::Message::ParameterStatus(body) => {
            let text = |value: std::io::Result<&str>| {
                value.map(str::to_owned).map_err(|error| PgError::Protocol(error.to_string()))
            };
            Incoming::Parameter(text(body.name())?, text(body.value())?)
        }
        other => Incoming::Other(other),
    })
}

fn read_row(mut body: Bytes) -> Result<Vec<Option<Bytes>>, PgError> {
    let cut = || PgError::Protocol("a row that is cut off".into());
    if body.len() < 2 {
        return Err(cut());
    }
    let columns = body.get_u16();
    let mut row = Vec::with_capacity(usize::from(columns.min(64)));
    for _ in 0..columns {
        if body.len() < 4 {
            return Err(cut());
        }
        // A negative length stands for NULL.
        row.push(match usize::try_from(body.get_i32()) {
            Err(_) => None,
            Ok(length) if length <= body.len() => Some(body.split_to(length)),
            Ok(_) => return Err(cut()),
        });
    }
    Ok(row)
}

fn read_error(mut fields: ErrorFields<'_>) -> Result<ServerError, PgError> {
    use fallible_iterator::FallibleIterator;
    let mut error = ServerError {
        severity: String::new(),
        code: String::new(),
        message: String::new(),
        detail: String::new(),
        hint: String::new(),
    };
    let protocol = |error: std::io::Error| PgError::Protocol(error.to_string());
    while let Some(field) = fields.next().map_err(protocol)? {
        let value = String::from_utf8_lossy(field.value_bytes()).into_owned();
        match field.type_() {
            // 'V' is the severity that is never translated; 'S' may be.
            b'V' => error.severity = value,
            b'S' if error.severity.is_empty() => error.severity = value,
            b'C' => error.code = value,
            b'M' => error.message = value,
            b'D' => error.detail = value,
            b'H' => error.hint = value,
            _ => {}
        }
    }
    Ok(error)
}
