//! Why a connection string cannot be used, in words that give no password away: an error may end in
//! a log, and a connection string that was mistyped may show its password in any place.

use std::fmt;
use std::io;
use std::path::PathBuf;

/// The longest value that an error repeats.
const SHOWN_VALUE_LIMIT: usize = 32;

/// Why a connection string cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConnInfoError {
    /// A form that libpq does not know.
    #[error("connection string, character {position}: {problem}")]
    Syntax {
        /// Counted from 1.
        position: usize,
        /// What is wrong, and what would be right.
        problem: &'static str,
    },
    /// A URI that is none.
    #[error("connection URI: {part} {problem}")]
    Uri {
        /// Where.
        part: String,
        /// What is wrong, and what would be right.
        problem: &'static str,
    },
    /// No keyword of libpq.
    #[error(
        "unknown keyword {keyword} in {place}: keywords are those of libpq, such as host, user and \
         sslmode"
    )]
    UnknownKeyword {
        /// The keyword in quotes, unless it may be part of a password.
        keyword: String,
        /// Where.
        place: String,
    },
    /// A value that its keyword does not take.
    #[error("{keyword} {value}{origin}: expected {expected}")]
    InvalidValue {
        /// The keyword.
        keyword: &'static str,
        /// The value in quotes, if it is fit to print.
        value: String,
        /// Where it comes from.
        origin: Origin,
        /// What would do.
        expected: String,
    },
    /// A keyword that pgkeep cannot honour.
    #[error("{keyword}{origin} is not supported: {advice}")]
    Unsupported {
        /// The keyword, and its value where only that is the matter.
        keyword: &'static str,
        /// Where it comes from.
        origin: Origin,
        /// What to do instead.
        advice: &'static str,
    },
    /// Two keywords that exclude each other.
    #[error("{0}")]
    Conflict(String),
    /// The user's name is nowhere to be found.
    #[error(
        "no user: set user= or PGUSER; the operating system has no name for the user pgkeep runs as"
    )]
    NoUser,
    /// A variable that is not UTF-8.
    #[error("environment variable {0} is not valid UTF-8")]
    VariableNotUtf8(&'static str),
    /// The service is in no service file.
    #[error(
        "service {service} not found in {looked_in:?}: add it, or correct service= or PGSERVICE"
    )]
    NoService {
        /// The service.
        service: String,
        /// The files that exist, of those where it could be.
        looked_in: Vec<PathBuf>,
    },
    /// A service file that cannot be understood.
    #[error("service file {path:?}, line {line}: {problem}")]
    ServiceFile {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong.
        problem: String,
    },
    /// A service file that cannot be read.
    #[error("service file {path:?} cannot be read: {source}")]
    ServiceFileUnreadable {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
}

/// Where a value comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The connection string.
    Given,
    /// The service file.
    Service,
    /// This environment variable.
    Variable(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Given => Ok(()),
            Origin::Service => f.write_str(" (from the service file)"),
            Origin::Variable(name) => write!(f, " (from {name})"),
        }
    }
}

/// A value for an error, if it is a plain word: anything else may be more than was meant.
pub(super) fn shown(value: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.:,!".contains(c);
    if value.len() <= SHOWN_VALUE_LIMIT && value.chars().all(plain) {
        format!("\"{value}\"")
    } else {
        "(not shown)".to_owned()
    }
}
