//! What most commands begin with: the configuration, the regions, the lineage.

use std::path::PathBuf;

use super::{CliError, Exit};
use crate::config::Config;
use crate::pg::{ConnInfo, Surroundings};
use crate::repo::Lineage;
use crate::store::{Catalog, Region, RegionSpec, Regions, list_lineages, open_region};

/// Where the configuration is looked for.
const PLACES: [&str; 2] = ["pgkeep.toml", "/etc/pgkeep/pgkeep.toml"];

/// What was said before the command.
pub struct Context {
    /// The configuration, if named.
    pub config: Option<PathBuf>,
}

impl Context {
    /// The configuration's place.
    pub fn config_file(&self) -> Result<PathBuf, CliError> {
        if let Some(file) = &self.config {
            return Ok(file.clone());
        }
        let found = PLACES.iter().map(PathBuf::from).find(|file| file.exists());
        found.ok_or_else(|| {
            CliError::new(
                Exit::Configuration,
                format!("no configuration: neither {} exists", PLACES.join(" nor ")),
            )
            .hint("\"pgkeep init\" writes one; --config or PGKEEP_CONFIG names another")
        })
    }

    /// The configuration.
    pub fn load(&self) -> Result<Config, CliError> {
        Ok(Config::load(&self.config_file()?)?)
    }
}

/// The connection string, with what the environment adds.
pub fn conninfo(config: &Config) -> Result<ConnInfo, CliError> {
    ConnInfo::parse(&config.cluster.conninfo, &Surroundings::from_process())
        .map_err(|error| CliError::new(Exit::Configuration, format!("cluster.conninfo: {error}")))
}

/// The regions, at their roots; only `wanted` if any are named. A local folder that is missing fails
/// each request until it is there, and keeps no other region from being used; if all are, it is an
/// error.
pub fn open_regions(config: &Config, wanted: &[String]) -> Result<Regions, CliError> {
    let unknown = wanted.iter().find(|name| !config.regions.iter().any(|r| r.name == **name));
    if let Some(name) = unknown {
        return Err(CliError::new(Exit::Usage, format!("no region is named {name:?}")));
    }
    let chosen = config.regions.iter().filter(|r| wanted.is_empty() || wanted.contains(&r.name));
    let mut regions = Vec::new();
    for region in chosen {
        let spec = RegionSpec {
            name: region.name.clone(),
            url: region.url.clone(),
            options: region.option_texts(),
        };
        let region = open_region(&spec)
            .map_err(|error| CliError::new(Exit::Configuration, error.to_string()))?;
        regions.push(region);
    }
    let missing: Option<Vec<String>> = regions.iter().map(Region::missing_folder).collect();
    match missing {
        Some(missing) => Err(CliError::new(
            Exit::Configuration,
            format!("there is no region to use: {}", missing.join("; ")),
        )),
        None => Ok(Regions::new(regions)),
    }
}

/// As [`open_regions`] for commands that only read: a region that is gone, or whose configuration is
/// wrong, is left out.
pub fn open_readable(config: &Config, wanted: &[String]) -> Result<Regions, CliError> {
    let names: Vec<String> = config.regions.iter().map(|region| region.name.clone()).collect();
    if let Some(name) = wanted.iter().find(|name| !names.contains(name)) {
        return Err(CliError::new(Exit::Usage, format!("no region is named {name:?}")));
    }
    let mut opened = Vec::new();
    let mut last = None;
    for name in names.iter().filter(|name| wanted.is_empty() || wanted.contains(name)) {
        match open_regions(config, std::slice::from_ref(name)) {
            Ok(one) => opened.extend(one.iter().cloned()),
            Err(error) => {
                tracing::warn!("{}", error.message);
                last = Some(error);
            }
        }
    }
    match last {
        Some(error) if opened.is_empty() => Err(error),
        _ => Ok(Regions::new(opened)),
    }
}

/// The catalog of the cluster's lineage: the only one, or the one that is asked for.
pub async fn catalog(
    config: &Config,
    regions: &Regions,
    lineage: Option<u64>,
) -> Result<Catalog, CliError> {
    let cluster = regions.within(&config.cluster.name);
    let lineages = list_lineages(&cluster).await?;
    let names = |lineages: &[Lineage]| {
        lineages.iter().map(|l| l.system_identifier.clone()).collect::<Vec<_>>().join(", ")
    };
    let all = names(&lineages);
    let chosen = match lineage {
        Some(wanted) => lineages.into_iter().find(|found| found.system_id() == wanted),
        None if lineages.len() > 1 => {
            return Err(CliError::new(
                Exit::Usage,
                format!(
                    "the archive {:?} holds several clusters (system identifiers {all})",
                    config.cluster.name
                ),
            )
            .hint("say which one with --lineage"));
        }
        None => lineages.into_iter().next(),
    };
    let Some(chosen) = chosen else {
        return Err(CliError::new(
            Exit::Failed,
            format!("the regions hold no archive of {:?}", config.cluster.name),
        )
        .hint("\"pgkeep run\" begins one; check cluster.name and the regions' URLs"));
    };
    let catalog = Catalog::read(&cluster, chosen).await?;
    for failure in &catalog.failures {
        tracing::warn!("{failure}");
    }
    Ok(catalog)
}
