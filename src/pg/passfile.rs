//! Passwords: how one is held, and how one is found in the password file (`~/.pgpass`).
//!
//! A line of the file, as libpq reads it (`passwordFromFile` in `fe-connect.c`):
//! ```text
//! hostname:port:database:username:password
//! ```
//! The first line whose four fields match wins. A field that is exactly `*` matches everything. A
//! backslash takes the character after it literally, so `\:` and `\\` stand for `:` and `\`, and
//! `\*` is a star that matches only a star. A line that starts with `#` is a comment. What follows
//! an unescaped `:` behind the password is ignored.
//!
//! A file that others can read is not used: a password in it must be taken for known. libpq prints
//! a warning and goes on without a password; here the caller gets the warning as an error, and
//! decides.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// The most that is read of a password file.
const PASSFILE_LIMIT_BYTES: u64 = 1 << 20;
/// The permissions of group and others, none of which the file may give.
const GROUP_AND_OTHERS: u32 = 0o077;

/// A password. It is never printed: [`Debug`](fmt::Debug) writes `***`.
///
/// Bytes and not text, because a password file may be in any encoding.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Vec<u8>);

/// Why a password file that exists was not used. Worth a warning: the server may let us in without.
#[derive(Debug, thiserror::Error)]
pub enum PassfileError {
    /// A directory, a pipe or a device.
    #[error("password file {path:?} was not used: it is not a plain file")]
    NotAPlainFile {
        /// The file.
        path: PathBuf,
    },
    /// Others can read or change it.
    #[error(
        "password file {path:?} was not used: group or others have access to it (mode {mode:04o}); \
         give it mode 0600"
    )]
    TooOpen {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// No password file is that long.
    #[error("password file {path:?} was not used: it is larger than {PASSFILE_LIMIT_BYTES} bytes")]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// It is there, and cannot be read.
    #[error(
        "password file {path:?} was not used: {source}; it must be readable by the user pgkeep \
         runs as"
    )]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
}

/// What a line of the password file must match.
#[derive(Clone, Copy, Debug)]
pub struct PasswordFor<'a> {
    /// The host as the user wrote it, `localhost` for the default socket directory.
    pub host: &'a str,
    /// The port.
    pub port: u16,
    /// The database, or `replication`.
    pub database: &'a str,
    /// The user.
    pub user: &'a str,
}

impl Secret {
    /// Takes a password into keeping.
    pub fn new(password: impl Into<Vec<u8>>) -> Secret {
        Secret(password.into())
    }

    /// The password itself, for the authentication exchange only.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Looks a password up in the file at `path`. A file that does not exist has no passwords.
pub fn look_up(path: &Path, wanted: PasswordFor<'_>) -> Result<Option<Secret>, PassfileError> {
    Ok(read(path)?.and_then(|content| find(&content, wanted)))
}

/// Reads the file, if it is there and fit to be trusted.
fn read(path: &Path) -> Result<Option<Vec<u8>>, PassfileError> {
    let unreadable = |source| PassfileError::Unreadable { path: path.to_owned(), source };
    // Looked at before it is opened: opening a pipe would wait for its other end.
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_file() => {}
        Ok(_) => return Err(PassfileError::NotAPlainFile { path: path.to_owned() }),
        Err(error) if is_absent(&error) => return Ok(None),
        Err(error) => return Err(unreadable(error)),
    }
    let file = File::open(path).map_err(unreadable)?;
    // Asked of the open file, so that what is checked is what is read.
    let mode = file.metadata().map_err(unreadable)?.permissions().mode() & 0o7777;
    if mode & GROUP_AND_OTHERS != 0 {
        return Err(PassfileError::TooOpen { path: path.to_owned(), mode });
    }
    let mut content = Vec::new();
    let read = file.take(PASSFILE_LIMIT_BYTES + 1).read_to_end(&mut content).map_err(unreadable)?;
    if read as u64 > PASSFILE_LIMIT_BYTES {
        return Err(PassfileError::TooLarge { path: path.to_owned() });
    }
    Ok(Some(content))
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// The password on the first line that matches.
fn find(content: &[u8], wanted: PasswordFor<'_>) -> Option<Secret> {
    let port = wanted.port.to_string();
    let fields = [wanted.host, &port, wanted.database, wanted.user];
    content.split(|&byte| byte == b'\n').find_map(|line| {
        let end = line.iter().rposition(|&byte| byte != b'\r').map_or(0, |last| last + 1);
        let line = &line[..end];
        if line.first() == Some(&b'#') {
            return None;
        }
        let password =
            fields.iter().try_fold(line, |rest, field| after_match(rest, field.as_bytes()))?;
        Some(Secret(unescape(password)))
    })
}

/// What follows the first field of `line` and its colon, if that field matches.
fn after_match<'a>(line: &'a [u8], wanted: &[u8]) -> Option<&'a [u8]> {
    if let Some(rest) = line.strip_prefix(b"*:") {
        return Some(rest);
    }
    let end = field_end(line);
    // Without a colon it is the last field of a line that is too short.
    let rest = line.get(end + 1..)?;
    (unescape(&line[..end]) == wanted).then_some(rest)
}

/// Where the first field ends: at a colon that is not escaped, or at the end of the line.
fn field_end(line: &[u8]) -> usize {
    let mut at = 0;
    while at < line.len() && line[at] != b':' {
        at += if line[at] == b'\\' { 2 } else { 1 };
    }
    at.min(line.len())
}

/// The first field of `line` without its backslashes. One at the very end stands for itself.
fn unescape(line: &[u8]) -> Vec<u8> {
    let mut bytes = line[..field_end(line)].iter().copied();
    let mut plain = Vec::new();
    while let Some(byte) = bytes.next() {
        plain.push(if byte == b'\\' { bytes.next().unwrap_or(byte) } else { byte });
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    const WANTED: PasswordFor<'_> =
        PasswordFor { host: "db1", port: 5432, database: "replication", user: "pgkeep" };

    fn found(content: &str, wanted: PasswordFor<'_>) -> Option<String> {
        find(content.as_bytes(), wanted)
            .map(|secret| String::from_utf8(secret.expose().to_vec()).unwrap())
    }

    fn file(content: &str, mode: u32) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        std::fs::set_permissions(file.path(), PermissionsExt::from_mode(mode)).unwrap();
        file
    }

    #[test]
    fn the_first_line_that_matches_wins() {
        let content = "db2:*:*:*:other\ndb1:5433:*:*:port\ndb1:5432:orders:pgkeep:database\n\
                       db1:5432:replication:backup:user\ndb1:*:*:pgkeep:right\n*:*:*:*:late\n";
        assert_eq!(found(content, WANTED).as_deref(), Some("right"));
        assert_eq!(found(content, PasswordFor { host: "db9", ..WANTED }).as_deref(), Some("late"));
        assert_eq!(found("db1:5432:orders:pgkeep:x", WANTED), None);
    }

    #[test]
    fn comments_short_lines_and_line_ends_are_no_passwords() {
        let content = "#*:*:*:*:comment\n\n*\n*:*:*:pgkeep\ndb1\r\n*:*:*:*:windows\r\n";
        assert_eq!(found(content, WANTED).as_deref(), Some("windows"));
        assert_eq!(found("*:*:*:*:no newline", WANTED).as_deref(), Some("no newline"));
        assert_eq!(found(" #*:*:*:*:x", WANTED), None);
    }

    #[test]
    fn backslashes_escape_colons_and_themselves() {
        let wanted = PasswordFor { host: "fe80::1", user: r"dom\me", ..WANTED };
        let content = r"fe80\:\:1:5432:replication:dom\\me:a\:b\\c\d";
        assert_eq!(found(content, wanted).as_deref(), Some(r"a:b\cd"));
        assert_eq!(found(r"*:*:*:*:ends with \", WANTED).as_deref(), Some(r"ends with \"));
        assert_eq!(found(r"*:*:*:pgkeep\", WANTED), None);
        assert_eq!(found("*:*:*:*:secret:ignored", WANTED).as_deref(), Some("secret"));
    }

    #[test]
    fn a_star_is_a_wildcard_only_alone_and_unescaped() {
        assert_eq!(found("db*:*:*:*:x", WANTED), None);
        assert_eq!(found(r"\*:*:*:*:x", WANTED), None);
        let star = PasswordFor { host: "*", ..WANTED };
        assert_eq!(found(r"\*:*:*:*:x", star).as_deref(), Some("x"));
    }

    #[test]
    fn a_password_in_another_encoding_is_kept_byte_for_byte() {
        let secret = find(b"*:*:*:*:gr\xfcn", WANTED).unwrap();
        assert_eq!(secret.expose(), b"gr\xfcn");
        assert_eq!(format!("{secret:?}"), "***");
    }

    #[test]
    fn a_file_that_others_can_read_is_refused_with_a_warning() {
        for mode in [0o640, 0o604, 0o620, 0o601] {
            let file = file("*:*:*:*:secret", mode);
            let error = look_up(file.path(), WANTED).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!(
                    "password file {:?} was not used: group or others have access to it \
                     (mode {mode:04o}); give it mode 0600",
                    file.path()
                )
            );
        }
        for mode in [0o600, 0o400] {
            let file = file("*:*:*:*:secret", mode);
            assert_eq!(look_up(file.path(), WANTED).unwrap(), Some(Secret::new("secret")));
        }
    }

    #[test]
    fn a_missing_file_has_no_passwords_and_a_folder_or_a_pipe_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(look_up(&folder.path().join("none"), WANTED).unwrap(), None);
        let error = look_up(folder.path(), WANTED).unwrap_err();
        assert!(matches!(error, PassfileError::NotAPlainFile { .. }));
        let pipe = folder.path().join("pipe");
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        let error = look_up(&pipe, WANTED).unwrap_err();
        assert!(matches!(error, PassfileError::NotAPlainFile { .. }));
    }

    #[test]
    fn a_file_beyond_the_limit_is_refused() {
        let file = file("", 0o600);
        File::options().write(true).open(file.path()).unwrap().set_len((1 << 20) + 1).unwrap();
        let error = look_up(file.path(), WANTED).unwrap_err();
        assert!(matches!(error, PassfileError::TooLarge { .. }));
    }
}
