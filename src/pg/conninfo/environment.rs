//! What surrounds pgkeep and stands in for what a connection string leaves open: environment
//! variables, the user's account and home folder, the places where PostgreSQL keeps things.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::error::{ConnInfoError, Origin};
use super::keywords::KEYWORDS;
use super::settings::Settings;

/// Finds an environment variable by its name.
pub type LookUp<'a> = Box<dyn Fn(&str) -> Option<OsString> + Send + Sync + 'a>;

/// Where defaults come from. Files are read from the file system; all else is here, so that a test
/// can set it.
pub struct Surroundings<'a> {
    /// Looks up an environment variable.
    pub variable: LookUp<'a>,
    /// The home folder of the user.
    pub home: Option<PathBuf>,
    /// The operating system's name for the user.
    pub os_user: Option<String>,
    /// Where local servers have their sockets.
    pub default_socket_directory: PathBuf,
    /// Where the system's `pg_service.conf` may lie, unless `PGSYSCONFDIR` says so.
    pub system_service_directories: Vec<PathBuf>,
}

impl Surroundings<'static> {
    /// Those of this process.
    pub fn from_process() -> Surroundings<'static> {
        let account = account(
            &std::fs::read_to_string("/etc/passwd").unwrap_or_default(),
            rustix::process::geteuid().as_raw(),
        );
        let (os_user, account_home) = account.unzip();
        let home = std::env::var_os("HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
        let packaged = Path::new("/var/run/postgresql");
        let sockets = if packaged.is_dir() { packaged } else { Path::new("/tmp") };
        Surroundings {
            variable: Box::new(|name| std::env::var_os(name)),
            home: home.or(account_home),
            os_user,
            default_socket_directory: sockets.to_owned(),
            // Debian's and Red Hat's.
            system_service_directories: vec!["/etc/postgresql-common".into(), "/etc".into()],
        }
    }
}

impl Surroundings<'_> {
    pub(super) fn variable(&self, name: &'static str) -> Result<Option<String>, ConnInfoError> {
        let Some(value) = (self.variable)(name) else { return Ok(None) };
        value.into_string().map(Some).map_err(|_| ConnInfoError::VariableNotUtf8(name))
    }

    /// A file in `~/.postgresql`.
    pub(super) fn ssl_file(&self, name: &str) -> Option<PathBuf> {
        Some(self.home.as_ref()?.join(".postgresql").join(name))
    }

    pub(super) fn existing_ssl_file(&self, name: &str) -> Option<PathBuf> {
        self.ssl_file(name).filter(|path| path.exists())
    }
}

/// The name and home folder of a user in the text of `/etc/passwd`. Users that only a directory
/// service knows are not found: asking it takes the C library.
pub(super) fn account(passwd: &str, user_id: u32) -> Option<(String, PathBuf)> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let id: u32 = fields.nth(1)?.parse().ok()?;
        let home = fields.nth(2)?;
        (id == user_id).then(|| (name.to_owned(), PathBuf::from(home)))
    })
}

/// Adds what the environment has for keywords that are not set.
pub(super) fn add_variables(
    settings: &mut Settings,
    surroundings: &Surroundings<'_>,
) -> Result<(), ConnInfoError> {
    for (keyword, variable, _) in KEYWORDS {
        if variable.is_empty() || settings.is_set(keyword) {
            continue;
        }
        if let Some(value) = surroundings.variable(variable)? {
            settings.set(keyword, value, Origin::Variable(variable));
        }
    }
    let require =
        surroundings.variable("PGREQUIRESSL")?.is_some_and(|value| value.starts_with('1'));
    if require && !settings.is_set("sslmode") {
        let origin = Origin::Variable("PGREQUIRESSL");
        settings.set("sslmode", "require".to_owned(), origin);
    }
    Ok(())
}
