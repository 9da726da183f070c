//! Messages of PostgreSQL's protocol, as the server writes and reads them.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use pgkeep::wal::Lsn;

/// Adds one message.
pub fn message(out: &mut BytesMut, tag: u8, body: &[u8]) {
    out.put_u8(tag);
    out.put_u32(body.len() as u32 + 4);
    out.put_slice(body);
}

fn text(body: &mut BytesMut, text: &str) {
    body.put_slice(text.as_bytes());
    body.put_u8(0);
}

pub fn parameter(out: &mut BytesMut, name: &str, value: &str) {
    let mut body = BytesMut::new();
    text(&mut body, name);
    text(&mut body, value);
    message(out, b'S', &body);
}

pub fn ready(out: &mut BytesMut) {
    message(out, b'Z', b"I");
}

pub fn complete(out: &mut BytesMut, tag: &str) {
    let mut body = BytesMut::new();
    text(&mut body, tag);
    message(out, b'C', &body);
}

pub fn error(out: &mut BytesMut, severity: &str, code: &str, what: &str) {
    let mut body = BytesMut::new();
    for (kind, value) in [(b'S', severity), (b'V', severity), (b'C', code), (b'M', what)] {
        body.put_u8(kind);
        text(&mut body, value);
    }
    body.put_u8(0);
    message(out, b'E', &body);
}

/// A result set: description, rows, tag.
pub fn rows(out: &mut BytesMut, columns: usize, rows: &[Vec<Option<Bytes>>], tag: &str) {
    let mut body = BytesMut::new();
    body.put_u16(columns as u16);
    for column in 0..columns {
        text(&mut body, &format!("c{column}"));
        body.put_slice(&[0; 6]);
        // Type text, of any length, in text format.
        body.put_u32(25);
        body.put_i16(-1);
        body.put_i32(-1);
        body.put_u16(0);
    }
    message(out, b'T', &body);
    for row in rows {
        let mut body = BytesMut::new();
        body.put_u16(row.len() as u16);
        for value in row {
            match value {
                None => body.put_i32(-1),
                Some(value) => {
                    body.put_i32(value.len() as i32);
                    body.put_slice(value);
                }
            }
        }
        message(out, b'D', &body);
    }
    complete(out, tag);
}

/// A value of a row.
pub fn value(text: impl ToString) -> Option<Bytes> {
    Some(Bytes::from(text.to_string()))
}

pub fn copy_both(out: &mut BytesMut) {
    message(out, b'W', &[0, 0, 0]);
}

pub fn wal_data(out: &mut BytesMut, start: Lsn, end: Lsn, clock: i64, wal: &[u8]) {
    let mut body = BytesMut::with_capacity(wal.len() + 25);
    body.put_u8(b'w');
    body.put_u64(start.0);
    body.put_u64(end.0);
    body.put_i64(clock);
    body.put_slice(wal);
    message(out, b'd', &body);
}

pub fn keepalive(out: &mut BytesMut, end: Lsn, clock: i64, reply: bool) {
    let mut body = BytesMut::with_capacity(18);
    body.put_u8(b'k');
    body.put_u64(end.0);
    body.put_i64(clock);
    body.put_u8(u8::from(reply));
    message(out, b'd', &body);
}

/// A client's status update.
#[derive(Clone, Copy, Debug)]
pub struct Status {
    pub written: Lsn,
    pub flushed: Lsn,
    pub applied: Lsn,
    pub reply: bool,
}

/// Reads `r` messages.
pub fn status(mut body: Bytes) -> Option<Status> {
    if body.len() != 34 || body.get_u8() != b'r' {
        return None;
    }
    let mut lsn = || Lsn(body.get_u64());
    let (written, flushed, applied) = (lsn(), lsn(), lsn());
    body.get_i64();
    Some(Status { written, flushed, applied, reply: body.get_u8() != 0 })
}

/// Takes a client's message: tag and body.
pub fn take(buffer: &mut BytesMut) -> Option<(u8, Bytes)> {
    if buffer.len() < 5 {
        return None;
    }
    let length = (&buffer[1..5]).get_u32() as usize;
    if buffer.len() < length + 1 {
        return None;
    }
    let mut message = buffer.split_to(length + 1).freeze();
    let tag = message.get_u8();
    message.advance(4);
    Some((tag, message))
}

/// Takes a startup packet: its parameters.
pub fn take_startup(buffer: &mut BytesMut) -> Option<Vec<(String, String)>> {
    if buffer.len() < 4 {
        return None;
    }
    let length = (&buffer[..4]).get_u32() as usize;
    if buffer.len() < length {
        return None;
    }
    let packet = buffer.split_to(length);
    let texts: Vec<String> = packet[8..]
        .split(|byte| *byte == 0)
        .map(|text| String::from_utf8_lossy(text).into_owned())
        .collect();
    Some(texts.chunks_exact(2).map(|pair| (pair[0].clone(), pair[1].clone())).collect())
}
