//! Service files, where sets of settings have names (`pg_service.conf`):
//! ```text
//! # a comment
//! [service]
//! keyword=value
//! ```
//! The user's file goes before the system's, and the first one that has the service ends the search.
//! Nothing is quoted, and no spaces stand around the `=`. What is set already stays.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::environment::Surroundings;
use super::error::{ConnInfoError, Origin, shown};
use super::settings::Settings;
use super::text::is_space;

/// The most that is read of a service file.
const SERVICE_FILE_LIMIT_BYTES: u64 = 1 << 20;

/// Adds what the service has, if one is named, for keywords that are not set.
pub(super) fn add_service(
    settings: &mut Settings,
    surroundings: &Surroundings<'_>,
) -> Result<(), ConnInfoError> {
    let named = |settings: &Settings, keyword: &str, variable| {
        let given = settings.value(keyword).map(str::to_owned);
        given.map_or_else(|| surroundings.variable(variable), |value| Ok(Some(value)))
    };
    let Some(service) = named(settings, "service", "PGSERVICE")? else { return Ok(()) };
    // Only a file that is named must be there.
    let mut files: Vec<(PathBuf, bool)> = Vec::new();
    match (named(settings, "servicefile", "PGSERVICEFILE")?, &surroundings.home) {
        (Some(own), _) => files.push((own.into(), true)),
        (None, Some(home)) => files.push((home.join(".pg_service.conf"), false)),
        (None, None) => {}
    }
    let system = match surroundings.variable("PGSYSCONFDIR")? {
        Some(directory) => vec![directory.into()],
        None => surroundings.system_service_directories.clone(),
    };
    files.extend(system.into_iter().map(|directory| (directory.join("pg_service.conf"), false)));
    let mut looked_in = Vec::new();
    for (path, must_exist) in files {
        if !must_exist && !path.exists() {
            continue;
        }
        let content = read_service_file(&path)?;
        if read_service(&path, &content, &service, settings)? {
            return Ok(());
        }
        looked_in.push(path);
    }
    Err(ConnInfoError::NoService { service: shown(&service), looked_in })
}

fn read_service_file(path: &Path) -> Result<String, ConnInfoError> {
    let read = || {
        let mut content = String::new();
        let limit = SERVICE_FILE_LIMIT_BYTES + 1;
        let read = File::open(path)?.take(limit).read_to_string(&mut content)?;
        if read as u64 == limit {
            let problem = format!("it is larger than {SERVICE_FILE_LIMIT_BYTES} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
        }
        Ok(content)
    };
    read().map_err(|source| ConnInfoError::ServiceFileUnreadable { path: path.to_owned(), source })
}

/// Adds the settings of `[service]`; says whether the file has it.
fn read_service(
    path: &Path,
    content: &str,
    service: &str,
    settings: &mut Settings,
) -> Result<bool, ConnInfoError> {
    let mut found = false;
    for (index, line) in content.lines().enumerate() {
        let line = line.trim_matches(is_space);
        let refuse = |problem: String| {
            Err(ConnInfoError::ServiceFile { path: path.to_owned(), line: index + 1, problem })
        };
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(group) = line.strip_prefix('[') {
            if found {
                break;
            }
            found = group.strip_prefix(service).is_some_and(|rest| rest.starts_with(']'));
            continue;
        }
        if !found {
            continue;
        }
        if line.starts_with("ldap") {
            return refuse("pgkeep does not ask LDAP servers; write the settings here".to_owned());
        }
        let Some((keyword, value)) = line.split_once('=') else {
            return refuse("expected keyword=value".to_owned());
        };
        if keyword == "service" || keyword == "servicefile" {
            return refuse("a service cannot name another".to_owned());
        }
        if value.contains('\0') {
            return refuse("a NUL byte".to_owned());
        }
        if !settings.is_set(keyword) && !settings.set(keyword, value.to_owned(), Origin::Service) {
            return refuse(format!("unknown keyword {}", shown(keyword)));
        }
    }
    Ok(found)
}
