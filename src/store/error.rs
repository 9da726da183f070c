//! What can go wrong with a store, sorted by what the caller can do about it.

use std::fmt;

/// How a failure is to be met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// The object is not there.
    NotFound,
    /// The store does not accept the credentials, or they do not allow the request.
    Denied,
    /// The network, a busy or broken server, a deadline: the same request may work later.
    Transient,
    /// The store will not do it, however often it is asked.
    Permanent,
    /// The object was read and is not what its name or its manifest says.
    Damaged,
}

/// A request to a region that failed.
#[derive(Debug, Clone)]
pub struct StoreError {
    /// How it is to be met.
    pub kind: FailureKind,
    /// The region's name.
    pub region: String,
    /// What was tried: `read`, `write`, `list` …
    pub operation: &'static str,
    /// The object or folder, relative to the region's URL.
    pub key: String,
    /// What the store said.
    pub message: String,
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "region {}: cannot {} {}: {}",
            self.region, self.operation, self.key, self.message
        )
    }
}

impl std::error::Error for StoreError {}

/// Sorts an error of the library. What it does not recognise counts as passing: retries are
/// bounded anyway, and giving up too early would lose more.
pub(super) fn kind_of(error: &object_store::Error) -> FailureKind {
    use object_store::Error;
    match error {
        Error::NotFound { .. } => FailureKind::NotFound,
        Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => FailureKind::Denied,
        Error::InvalidPath { .. }
        | Error::NotSupported { .. }
        | Error::NotImplemented { .. }
        | Error::UnknownConfigurationKey { .. }
        | Error::Precondition { .. }
        | Error::NotModified { .. } => FailureKind::Permanent,
        _ => FailureKind::Transient,
    }
}

/// One line that holds the causes too, each said once, without what stores add of XML.
pub(super) fn describe(error: &object_store::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        cause = inner.source();
    }
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match text.char_indices().nth(600) {
        Some((cut, _)) => format!("{}…", &text[..cut]),
        None => text,
    }
}
