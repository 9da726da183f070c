//! A connection that was authenticated, shown to tokio-postgres as one that is about to begin: what
//! it sends as its startup message goes nowhere, and it is told at once that it may go on.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::Connection;
use super::socket::Socket;

/// Bytes that say how long the startup message is; the length counts them too.
const LENGTH: usize = 4;

/// The stream for tokio-postgres.
pub(super) struct Greeted {
    socket: Socket,
    /// What it reads before anything of the socket.
    first: Bytes,
    /// The startup message's length as far as it was written.
    length: BytesMut,
    /// How much of the startup message is still to come; `None` before its length is known.
    left: Option<usize>,
}

impl Greeted {
    pub(super) fn new(connection: Connection) -> Greeted {
        let (socket, received) = connection.into_socket();
        let mut first = BytesMut::new();
        // AuthenticationOk, then ReadyForQuery outside of a transaction.
        first.put_slice(b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05I");
        first.extend_from_slice(&received);
        Greeted { socket, first: first.freeze(), length: BytesMut::new(), left: None }
    }

    /// Takes what belongs to the startup message; how much that is.
    fn swallow(&mut self, bytes: &[u8]) -> usize {
        let left = match self.left {
            Some(left) => left,
            None => {
                let take = (LENGTH - self.length.len()).min(bytes.len());
                self.length.extend_from_slice(&bytes[..take]);
                if self.length.len() == LENGTH {
                    let total = self.length.clone().get_u32() as usize;
                    self.left = Some(total.saturating_sub(LENGTH));
                }
                return take;
            }
        };
        let take = left.min(bytes.len());
        self.left = Some(left - take);
        take
    }
}

impl AsyncRead for Greeted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.first.is_empty() {
            return Pin::new(&mut self.socket).poll_read(context, buffer);
        }
        let take = self.first.len().min(buffer.remaining());
        buffer.put_slice(&self.first.split_to(take));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Greeted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.left != Some(0) && !bytes.is_empty() {
            return Poll::Ready(Ok(self.swallow(bytes)));
        }
        Pin::new(&mut self.socket).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(context)
    }
}
