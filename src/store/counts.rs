//! How many requests a region was sent, by kind, and how many bytes went each way. Stores charge
//! by these; tests bound them.
//!
//! Every attempt counts, and every page of a listing (a store brought by [`Region::over`] and a
//! local folder list in one piece, which counts once). An upload in parts is its beginning, its
//! parts and its end, all of them writes. A deletion of many counts as the requests that the kind
//! of store needs: one for 1,000 objects on S3, for 256 on Azure, for each elsewhere.
//!
//! [`Region::over`]: super::Region::over

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// What a request does, in the words of S3's price list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RequestKind {
    Put,
    Get,
    Head,
    List,
    Delete,
}

impl RequestKind {
    /// The verb for error messages.
    pub(super) fn verb(self) -> &'static str {
        match self {
            RequestKind::Put => "write",
            RequestKind::Get => "read",
            RequestKind::Head => "look up",
            RequestKind::List => "list",
            RequestKind::Delete => "delete",
        }
    }
}

/// Requests and bytes since the region was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestCounts {
    /// Writes: whole objects, and beginnings, parts and ends of uploads.
    pub put: u64,
    /// Reads.
    pub get: u64,
    /// Look-ups of one object's size.
    pub head: u64,
    /// Pages of listings.
    pub list: u64,
    /// Deletions.
    pub delete: u64,
    /// Bytes of objects sent, also by attempts that failed.
    pub bytes_up: u64,
    /// Bytes of objects received, also by attempts that failed.
    pub bytes_down: u64,
}

impl RequestCounts {
    /// Requests of every kind.
    pub fn total(&self) -> u64 {
        self.put + self.get + self.head + self.list + self.delete
    }
}

/// The running counts, shared by all clones of a region.
#[derive(Debug, Default)]
pub(super) struct Counters {
    put: AtomicU64,
    get: AtomicU64,
    head: AtomicU64,
    list: AtomicU64,
    delete: AtomicU64,
    bytes_up: AtomicU64,
    bytes_down: AtomicU64,
}

impl Counters {
    pub(super) fn requests(&self, kind: RequestKind, count: u64) {
        let counter = match kind {
            RequestKind::Put => &self.put,
            RequestKind::Get => &self.get,
            RequestKind::Head => &self.head,
            RequestKind::List => &self.list,
            RequestKind::Delete => &self.delete,
        };
        counter.fetch_add(count, Relaxed);
    }

    pub(super) fn sent(&self, bytes: u64) {
        self.bytes_up.fetch_add(bytes, Relaxed);
    }

    pub(super) fn received(&self, bytes: u64) {
        self.bytes_down.fetch_add(bytes, Relaxed);
    }

    pub(super) fn snapshot(&self) -> RequestCounts {
        RequestCounts {
            put: self.put.load(Relaxed),
            get: self.get.load(Relaxed),
            head: self.head.load(Relaxed),
            list: self.list.load(Relaxed),
            delete: self.delete.load(Relaxed),
            bytes_up: self.bytes_up.load(Relaxed),
            bytes_down: self.bytes_down.load(Relaxed),
        }
    }
}
