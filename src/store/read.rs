//! Reading objects: whole, ranges, the end.
//!
//! The answer must begin soon and never pause for long, so a store that hangs is known within
//! seconds however large the object is.

use std::ops::Range;
use std::panic::AssertUnwindSafe;

use bytes::{Bytes, BytesMut};
use futures_util::{FutureExt, StreamExt};
use object_store::{GetOptions, GetRange, GetResult, GetResultPayload};

use super::counts::RequestKind;
use super::{FailureKind, Region, StoreError};

/// Memory set aside before the first chunk has come; what a store says of a size is not believed.
const FIRST_CAPACITY: u64 = 32 << 20;

impl Region {
    /// Reads a whole object, from the store and from nowhere else.
    ///
    /// # Errors
    /// When it is not there or the store fails, also after retries.
    pub async fn get(&self, key: &str) -> Result<Bytes, StoreError> {
        self.read(key, None).await.map(|(bytes, _)| bytes)
    }

    /// Reads a range of an object.
    ///
    /// # Errors
    /// When it is not there, is shorter, or the store fails, also after retries.
    pub async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let length = range.end.saturating_sub(range.start);
        if length == 0 {
            return Ok(Bytes::new());
        }
        let found = match self.read(key, Some(GetRange::Bounded(range.clone()))).await {
            Ok((bytes, _)) if bytes.len() as u64 == length => return Ok(bytes),
            Ok((bytes, size)) => format!("{} of {size} bytes came", bytes.len()),
            // A range that begins behind the end is refused.
            Err(error) if error.kind == FailureKind::Permanent => match self.size(key).await? {
                Some(size) if size <= range.start => format!("it has {size} bytes"),
                _ => return Err(error),
            },
            Err(error) => return Err(error),
        };
        let message = format!("bytes {} to {} were wanted, and {found}", range.start, range.end);
        Err(self.error("read", key, FailureKind::Damaged, message))
    }

    /// Reads the last `length` bytes of an object, or all of a shorter one, and tells its size.
    ///
    /// # Errors
    /// When it is not there or the store fails, also after retries.
    pub async fn get_tail(&self, key: &str, length: u64) -> Result<(Bytes, u64), StoreError> {
        match self.read(key, Some(GetRange::Suffix(length))).await {
            // Azure knows no ranges from the end, and others none of an empty object.
            Err(error) if error.kind == FailureKind::Permanent => {
                let Some(size) = self.size(key).await? else {
                    return Err(self.missing(key, error.message));
                };
                let bytes = self.get_range(key, size.saturating_sub(length)..size).await?;
                Ok((bytes, size))
            }
            outcome => outcome,
        }
    }

    /// The bytes asked for, and the size of the object.
    async fn read(&self, key: &str, range: Option<GetRange>) -> Result<(Bytes, u64), StoreError> {
        self.retry(|| self.read_once(key, range.clone())).await
    }

    async fn read_once(
        &self,
        key: &str,
        range: Option<GetRange>,
    ) -> Result<(Bytes, u64), StoreError> {
        const GET: RequestKind = RequestKind::Get;
        let store = self.store(GET, key).await?;
        let options = GetOptions { range, ..GetOptions::default() };
        let path = self.path(key);
        // The library adds to numbers of the answer, which overflow where overflow is checked:
        // Garage says "bytes 0-18446744073709551615/0" of an empty object.
        let request = AssertUnwindSafe(store.get_opts(&path, options)).catch_unwind();
        let request = async { request.await.unwrap_or_else(|_| Err(senseless())) };
        let answer = self.once(GET, key, 0, request).await?;
        let size = answer.meta.size;
        let length = answer.range.end.saturating_sub(answer.range.start);
        let deadline = self.patience.for_read(length);
        let bytes = if matches!(answer.payload, GetResultPayload::File(..)) {
            let bytes = self.within_time(GET, key, deadline, answer.bytes()).await?;
            self.shared.counters.received(bytes.len() as u64);
            bytes
        } else {
            match tokio::time::timeout(deadline, self.collect(key, answer, length)).await {
                Ok(bytes) => bytes?,
                Err(_) => {
                    let message =
                        format!("{length} bytes did not come within {} s", deadline.as_secs_f32());
                    return Err(self.error("read", key, FailureKind::Transient, message));
                }
            }
        };
        if bytes.len() as u64 == length {
            return Ok((bytes, size));
        }
        let message = format!("the answer ended after {} of {length} bytes", bytes.len());
        Err(self.error("read", key, FailureKind::Transient, message))
    }

    async fn collect(
        &self,
        key: &str,
        answer: GetResult,
        length: u64,
    ) -> Result<Bytes, StoreError> {
        let idle = self.patience.idle;
        let mut chunks = answer.into_stream();
        let mut all = BytesMut::new();
        let mut first = Bytes::new();
        loop {
            let Ok(next) = tokio::time::timeout(idle, chunks.next()).await else {
                let received = first.len() + all.len();
                let message = format!(
                    "nothing came for {} s, after {received} of {length} bytes",
                    idle.as_secs_f32()
                );
                return Err(self.error("read", key, FailureKind::Transient, message));
            };
            let chunk = match next {
                Some(Ok(chunk)) => chunk,
                Some(Err(error)) => return Err(self.failed(RequestKind::Get, key, &error)),
                // A small object is one chunk, which is not copied.
                None if all.is_empty() => return Ok(first),
                None => return Ok(all.freeze()),
            };
            self.shared.counters.received(chunk.len() as u64);
            if all.is_empty() && first.is_empty() {
                first = chunk;
                continue;
            }
            if all.is_empty() {
                all.reserve(usize::try_from(length.min(FIRST_CAPACITY)).unwrap_or(0));
                all.extend_from_slice(&std::mem::take(&mut first));
            }
            all.extend_from_slice(&chunk);
        }
    }
}

fn senseless() -> object_store::Error {
    object_store::Error::NotSupported { source: "the answer makes no sense".into() }
}
