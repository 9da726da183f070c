//! The part of `restore` that brings captured files (`backup.include`) back.

use std::path::{Path, PathBuf};

use clap::Args as ClapArgs;
use serde::Serialize;

use super::{CliError, Exit, output};
use crate::repo::{BackupInfo, BackupLabel, ContentKey};
use crate::restore::{IncludeOptions, IncludeOutcome, PreparedInclude, prepare_include};
use crate::store::Catalog;

/// How many failures are told one by one.
const TOLD: usize = 10;

/// Arguments about captured files.
#[derive(Debug, ClapArgs)]
#[command(group(clap::ArgGroup::new("include_where").multiple(false)))]
pub struct IncludeArgs {
    /// After the database, write the files that backup.include captured below this folder, with
    /// their full paths
    #[arg(long, group = "include_where", value_name = "DIR")]
    include_to: Option<PathBuf>,
    /// After the database, write the captured files to their own places; what is there already must
    /// be the same
    #[arg(long, group = "include_where")]
    include_in_place: bool,
    /// Replace files that are there and differ from the captured ones
    #[arg(long, requires = "include_where")]
    include_overwrite: bool,
    /// Only the captured files, of the newest backup that has some, or of --backup
    #[arg(long, requires = "include_where", conflicts_with_all = ["pgdata", "target", "delta", "tablespace_map"])]
    pub include_only: bool,
}

/// What is told of captured files as JSON.
#[derive(Clone, Debug, Serialize)]
pub struct IncludeReport {
    backup: BackupLabel,
    to: PathBuf,
    files: u64,
    bytes: u64,
    written_files: Option<u64>,
    written_bytes: Option<u64>,
    failures: Vec<String>,
}

impl IncludeArgs {
    fn root(&self) -> Option<&Path> {
        match self.include_in_place {
            true => Some(Path::new("/")),
            false => self.include_to.as_deref(),
        }
    }

    /// Verifies the captured files of a backup and where they go, if they are asked for.
    pub async fn prepare(
        &self,
        catalog: &Catalog,
        label: &BackupLabel,
        keep_out: Vec<PathBuf>,
    ) -> Result<Option<PreparedInclude>, CliError> {
        let Some((info, _)) = catalog.backups.get(label) else { return Ok(None) };
        let Some(root) = self.root() else {
            if let Some(included) = &info.include {
                output::note(&format!(
                    "captured: {} files of {} lie beside the backup; --include-to brings them",
                    included.files,
                    included.paths.join(", ")
                ));
            }
            return Ok(None);
        };
        let key = ContentKey::for_system(catalog.lineage.system_id());
        let options =
            IncludeOptions { root: root.to_owned(), overwrite: self.include_overwrite, keep_out };
        let prepared = prepare_include(&catalog.regions, info, &key, options).await?;
        tell(&prepared, info);
        Ok(Some(prepared))
    }

    /// The backup whose captured files are brought when no database is.
    pub fn choose<'a>(
        &self,
        catalog: &'a Catalog,
        wanted: Option<&BackupLabel>,
    ) -> Result<&'a BackupLabel, CliError> {
        let newest = catalog.backups_by_time().into_iter().rev().map(|(info, _)| info);
        let mut suiting = newest.filter(|info| match wanted {
            Some(label) => info.label == *label,
            None => info.include.is_some(),
        });
        match (suiting.next(), wanted) {
            (Some(info), _) => Ok(&info.label),
            (None, Some(label)) => {
                Err(CliError::new(Exit::Unreachable, format!("there is no backup {label}")))
            }
            (None, None) => Err(CliError::new(Exit::Unreachable, "no backup has captured files")
                .hint("backup.include names what is captured with the next one")),
        }
    }
}

fn tell(prepared: &PreparedInclude, info: &BackupInfo) {
    let included = &prepared.included;
    output::note(&format!(
        "captured: {} files, {}, of {} go to {}{}",
        included.files,
        output::bytes(included.bytes),
        included.paths.join(", "),
        prepared.root().display(),
        match prepared.there {
            0 => String::new(),
            there => format!(" ({there} are there already)"),
        }
    ));
    for failure in info.include_failures.iter().take(TOLD) {
        output::note(&format!("          not captured as a whole: {failure}"));
    }
    if let Some(more) = info.include_failures.len().checked_sub(TOLD).filter(|more| *more > 0) {
        output::note(&format!("          and {more} more"));
    }
}

/// Writes what was prepared, and tells it.
pub async fn write(prepared: PreparedInclude) -> Result<IncludeOutcome, CliError> {
    let root = prepared.root().to_owned();
    let outcome = prepared.write().await?;
    output::note(&format!(
        "{} captured files, {}, were written to {}; {} were there already",
        outcome.files,
        output::bytes(outcome.bytes),
        root.display(),
        outcome.there
    ));
    Ok(outcome)
}

/// The report, with an outcome once there is one.
pub fn report(
    catalog: &Catalog,
    label: &BackupLabel,
    root: &Path,
    outcome: Option<IncludeOutcome>,
) -> Option<IncludeReport> {
    let (info, _) = catalog.backups.get(label)?;
    let included = info.include.as_ref()?;
    Some(IncludeReport {
        backup: label.clone(),
        to: root.to_owned(),
        files: included.files,
        bytes: included.bytes,
        written_files: outcome.map(|outcome| outcome.files),
        written_bytes: outcome.map(|outcome| outcome.bytes),
        failures: info.include_failures.clone(),
    })
}
