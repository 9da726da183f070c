//! What can go wrong with a store, sorted by what the caller can do about it.

use std::fmt;

/// How much of what a store says is kept.
const MESSAGE_CHARACTERS: usize = 600;
/// What the library says when an object does not have the range that was asked for.
const RANGE_FAILURES: [&str; 4] = [
    "Requested range was invalid",
    "Wanted range starting at",
    "Received non-partial response",
    "Failed to parse value for CONTENT_RANGE",
];

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

/// Sorts an error of the library, and says it in one readable line. What is not recognised counts
/// as passing: retries are bounded anyway, and giving up too early would lose more.
pub(super) fn sort(error: &object_store::Error) -> (FailureKind, String) {
    let (kind, text) = sort_whole(error);
    match text.char_indices().nth(MESSAGE_CHARACTERS) {
        Some((cut, _)) => (kind, format!("{}…", &text[..cut])),
        None => (kind, text),
    }
}

fn sort_whole(error: &object_store::Error) -> (FailureKind, String) {
    use object_store::Error;
    let text = describe(error);
    if let Some(answer) = Answer::find(&text) {
        return (answer.kind(), answer.message(&text));
    }
    if let Some(io) = cause::<std::io::Error>(error) {
        return sort_io(io, text);
    }
    let kind = match error {
        Error::NotFound { .. } => FailureKind::NotFound,
        Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => FailureKind::Denied,
        Error::InvalidPath { .. }
        | Error::NotSupported { .. }
        | Error::NotImplemented { .. }
        | Error::UnknownConfigurationKey { .. }
        | Error::Precondition { .. }
        | Error::NotModified { .. } => FailureKind::Permanent,
        _ if RANGE_FAILURES.iter().any(|said| text.contains(said)) => FailureKind::Permanent,
        _ => FailureKind::Transient,
    };
    (kind, text)
}

/// Whether the store, or the file system, does not know how to create an object only if it is not
/// there, as opposed to having found it there.
pub(super) fn cannot_create(error: &object_store::Error) -> bool {
    use object_store::Error;
    if matches!(error, Error::NotImplemented { .. } | Error::NotSupported { .. }) {
        return true;
    }
    if let Some(io) = cause::<std::io::Error>(error) {
        // A file system without hard links, by which the library publishes a file.
        let errno = io.raw_os_error().map(rustix::io::Errno::from_raw_os_error);
        return matches!(
            errno,
            Some(rustix::io::Errno::PERM | rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS)
        );
    }
    Answer::find(&describe(error)).is_some_and(|answer| answer.status == 501)
}

fn sort_io(error: &std::io::Error, text: String) -> (FailureKind, String) {
    use std::io::ErrorKind;
    match error.kind() {
        ErrorKind::StorageFull => (FailureKind::Transient, format!("the disk is full: {text}")),
        ErrorKind::QuotaExceeded => {
            (FailureKind::Transient, format!("the disk quota is used up: {text}"))
        }
        ErrorKind::NotFound => (FailureKind::NotFound, text),
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => (FailureKind::Denied, text),
        ErrorKind::ConnectionRefused => {
            (FailureKind::Transient, format!("nothing listens there: {text}"))
        }
        _ if text.contains("dns error") => {
            (FailureKind::Transient, format!("the host's name cannot be resolved: {text}"))
        }
        _ => (FailureKind::Transient, text),
    }
}

/// The cause of a type, somewhere in the chain.
fn cause<T: std::error::Error + 'static>(error: &object_store::Error) -> Option<&T> {
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(inner) = next {
        if let Some(found) = inner.downcast_ref::<T>() {
            return Some(found);
        }
        next = inner.source();
    }
    None
}

/// What an HTTP answer says. The library keeps the status to itself, but for its text.
struct Answer<'a> {
    status: u16,
    reason: &'a str,
    /// The store's own code and words, where the answer has a body.
    code: &'a str,
    words: &'a str,
}

impl<'a> Answer<'a> {
    fn find(text: &'a str) -> Option<Answer<'a>> {
        let (_, rest) = text.split_once("non-2xx status code: ")?;
        let (reason, body) = rest.split_once(':').unwrap_or((rest, ""));
        let status = reason.get(..3)?.parse().ok()?;
        let (code, words) = (element(body, "Code"), element(body, "Message"));
        Some(Answer { status, reason, code, words })
    }

    fn kind(&self) -> FailureKind {
        match (self.status, self.code) {
            // To repeat it may help; what a missing bucket "does not have" is not known.
            (404, "NoSuchBucket" | "ContainerNotFound" | "NoSuchContainer") => {
                FailureKind::Permanent
            }
            (404, _) => FailureKind::NotFound,
            (401 | 403, _) => FailureKind::Denied,
            (
                400,
                "ExpiredToken"
                | "InvalidToken"
                | "TokenRefreshRequired"
                | "AuthorizationHeaderMalformed",
            ) => FailureKind::Denied,
            // Damaged or cut off on the way.
            (
                400,
                ""
                | "RequestTimeout"
                | "BadDigest"
                | "InvalidDigest"
                | "IncompleteBody"
                | "XAmzContentSHA256Mismatch"
                | "Md5Mismatch",
            ) => FailureKind::Transient,
            (408 | 409 | 429, _) => FailureKind::Transient,
            (300..=499 | 501 | 505, _) => FailureKind::Permanent,
            _ => FailureKind::Transient,
        }
    }

    fn message(&self, text: &str) -> String {
        let said = match (self.code, self.words) {
            ("", _) => return text.to_owned(),
            (code, "") => format!("{} ({code})", self.reason),
            (code, words) => format!("{} ({code}: {words})", self.reason),
        };
        match self.code {
            "NoSuchBucket" | "ContainerNotFound" | "NoSuchContainer" => {
                format!("the bucket or container does not exist: {said}")
            }
            "RequestTimeTooSkewed" => format!("the clock of this machine is wrong: {said}"),
            "SlowDown" | "TooManyRequests" | "ServerBusy" => {
                format!("the store wants fewer requests: {said}")
            }
            _ => said,
        }
    }
}

/// The text of an XML element, as the stores' error bodies have it.
fn element<'a>(body: &'a str, name: &str) -> &'a str {
    let inner = |open: String, close: String| {
        let (_, rest) = body.split_once(&open)?;
        rest.split_once(&close).map(|(text, _)| text.trim())
    };
    inner(format!("<{name}>"), format!("</{name}>")).unwrap_or("")
}

/// One line that holds the causes too, each said once.
fn describe(error: &object_store::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        cause = inner.source();
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
