//! As much of HTTP/1.1 as a proxy needs to tell one request from the next.

use std::io::{self, BufRead, Read, Write};

/// How the body ends.
enum Body {
    Length(u64),
    Chunked,
    UntilClosed,
}

/// A request or a response: its head, and how to read its body.
pub(super) struct Message {
    head: Vec<u8>,
    body: Body,
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

impl Message {
    /// The next request; `None` once the client has closed the connection.
    pub(super) fn read_request(from: &mut impl BufRead) -> io::Result<Option<Message>> {
        let head = read_head(from)?;
        Ok(head.map(|head| {
            let body = framing(&head).unwrap_or(Body::Length(0));
            Message { head, body }
        }))
    }

    /// The response to a request; `None` once the server has closed the connection.
    pub(super) fn read_response(
        from: &mut impl BufRead,
        request: &Message,
    ) -> io::Result<Option<Message>> {
        let Some(head) = read_head(from)? else { return Ok(None) };
        let status = first_line(&head).split(' ').nth(1).unwrap_or_default().to_owned();
        let bodiless = request.head.starts_with(b"HEAD ") || status == "204" || status == "304";
        let body =
            if bodiless { Body::Length(0) } else { framing(&head).unwrap_or(Body::UntilClosed) };
        Ok(Some(Message { head, body }))
    }

    pub(super) fn head(&self) -> &[u8] {
        &self.head
    }

    pub(super) fn is_put(&self) -> bool {
        self.head.starts_with(b"PUT ")
    }

    pub(super) fn path(&self) -> String {
        first_line(&self.head).split(' ').nth(1).unwrap_or_default().to_owned()
    }

    /// Reads the body, as it is framed, portion by portion.
    pub(super) fn body(
        &self,
        from: &mut impl BufRead,
        mut take: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        match self.body {
            Body::Length(length) => copy(from, length, &mut take),
            Body::UntilClosed => copy(from, u64::MAX, &mut take),
            Body::Chunked => loop {
                let mut line = Vec::new();
                from.read_until(b'\n', &mut line)?;
                let text = String::from_utf8_lossy(&line);
                let size = text.trim_end().split(';').next().unwrap_or_default();
                let size = u64::from_str_radix(size, 16).map_err(|_| malformed("chunk size"))?;
                take(&line)?;
                copy(from, size + 2, &mut take)?;
                if size == 0 {
                    return Ok(());
                }
            },
        }
    }
}

/// Passes on `length` bytes, or as many as there are.
fn copy(
    from: &mut impl BufRead,
    length: u64,
    take: &mut impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut part = from.take(length);
    loop {
        let buffer = part.fill_buf()?;
        if buffer.is_empty() {
            return Ok(());
        }
        take(buffer)?;
        let count = buffer.len();
        part.consume(count);
    }
}

fn read_head(from: &mut impl BufRead) -> io::Result<Option<Vec<u8>>> {
    let mut head = Vec::new();
    loop {
        let count = from.read_until(b'\n', &mut head)?;
        if count == 0 {
            return if head.is_empty() {
                Ok(None)
            } else {
                Err(malformed("a head that is cut off"))
            };
        }
        if head.ends_with(b"\r\n\r\n") {
            return Ok(Some(head));
        }
    }
}

fn first_line(head: &[u8]) -> String {
    let end = head.iter().position(|byte| *byte == b'\r').unwrap_or(head.len());
    String::from_utf8_lossy(&head[..end]).into_owned()
}

/// What the head says about the body; `None` where it says nothing.
fn framing(head: &[u8]) -> Option<Body> {
    String::from_utf8_lossy(head).lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        match name.to_ascii_lowercase().as_str() {
            "content-length" => value.trim().parse().ok().map(Body::Length),
            "transfer-encoding" => Some(Body::Chunked),
            _ => None,
        }
    })
}

/// Answers a request with a status and no body, as a store or something in front of it would.
pub(super) fn answer(client: &mut impl Write, status: u16) -> io::Result<()> {
    write!(
        client,
        "HTTP/1.1 {status} proxy\r\nETag: \"00000000000000000000000000000000\"\r\n\
         Content-Length: 0\r\n\r\n"
    )
}
