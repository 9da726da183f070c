//! From a URL to a store: `file://`, `s3://`, `gs://`, `az://`.
//!
//! Credentials and endpoints come from each provider's usual environment variables, and from keys
//! of the region's own configuration, which win. Keys are those of the object store library
//! (`endpoint`, `access_key_id`, `region` …).

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::path::Path;
use object_store::{ClientOptions, RetryConfig};
use url::Url;

use super::region::{Backend, Region};
use super::{FailureKind, StoreError};

/// How long a connection to a store may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A region as the user describes it.
#[derive(Clone, PartialEq, Eq)]
pub struct RegionSpec {
    /// Its name.
    pub name: String,
    /// Its URL.
    pub url: String,
    /// Options for the store: endpoint, credentials … May hold secrets.
    pub options: BTreeMap<String, String>,
}

impl std::fmt::Debug for RegionSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let keys: Vec<_> = self.options.keys().collect();
        write!(f, "RegionSpec({} = {}, options {keys:?})", self.name, self.url)
    }
}

/// What S3 deletes in one request.
const S3_DELETES: usize = 1000;
/// What Azure deletes in one request.
const AZURE_DELETES: usize = 256;
/// Google's interface knows no deletion of many.
const GCS_DELETES: usize = 1;

/// Opens a region. No request is made, and no folder is looked for: one that is missing is told by
/// each request, until it is there.
///
/// # Errors
/// A URL of an unknown kind, an unknown option, options that do not fit together.
pub fn open_region(spec: &RegionSpec) -> Result<Region, StoreError> {
    let fail = |message: String| StoreError {
        kind: FailureKind::Permanent,
        region: spec.name.clone(),
        operation: "open",
        key: spec.url.clone(),
        message,
    };
    let url = Url::parse(&spec.url).map_err(|error| {
        fail(format!("{error}; regions are file:///folder, s3://bucket/prefix, gs://… or az://…"))
    })?;
    let path = || {
        Path::from_url_path(url.path().trim_matches('/')).map_err(|error| fail(error.to_string()))
    };
    let built = |error: object_store::Error| fail(super::error::sort(&error).1);
    let (backend, root) = match url.scheme() {
        "file" => (open_folder(&url, spec).map_err(fail)?, Path::default()),
        "s3" | "s3a" => {
            let mut builder = AmazonS3Builder::from_env()
                .with_url(bucket_url(&url))
                .with_client_options(client_options(spec))
                .with_retry(no_retries());
            for (key, value) in &spec.options {
                let key = AmazonS3ConfigKey::from_str(key).map_err(built)?;
                builder = builder.with_config(key, value);
            }
            (Backend::cloud(builder.build().map_err(built)?, S3_DELETES), path()?)
        }
        "gs" => {
            let mut builder = GoogleCloudStorageBuilder::from_env()
                .with_url(bucket_url(&url))
                .with_client_options(client_options(spec))
                .with_retry(no_retries());
            for (key, value) in &spec.options {
                let key = GoogleConfigKey::from_str(key).map_err(built)?;
                builder = builder.with_config(key, value);
            }
            (Backend::cloud(builder.build().map_err(built)?, GCS_DELETES), path()?)
        }
        "az" | "azure" | "abfs" | "abfss" => {
            let mut builder = MicrosoftAzureBuilder::from_env()
                .with_url(bucket_url(&url))
                .with_client_options(client_options(spec))
                .with_retry(no_retries());
            for (key, value) in &spec.options {
                let key = AzureConfigKey::from_str(key).map_err(built)?;
                builder = builder.with_config(key, value);
            }
            (Backend::cloud(builder.build().map_err(built)?, AZURE_DELETES), path()?)
        }
        other => {
            return Err(fail(format!(
                "unknown kind of store {other}://; file, s3, gs and az exist"
            )));
        }
    };
    Ok(Region::new(spec.name.clone(), spec.url.clone(), backend, root))
}

/// The URL without its path, which is this crate's to handle.
fn bucket_url(url: &Url) -> String {
    let mut bucket = url.clone();
    bucket.set_path("");
    bucket.set_query(None);
    bucket.to_string()
}

fn open_folder(url: &Url, spec: &RegionSpec) -> Result<Backend, String> {
    if let Some(key) = spec.options.keys().next() {
        return Err(format!("a local folder has no option {key:?}"));
    }
    let folder: PathBuf =
        url.to_file_path().map_err(|()| "a local folder is written file:///folder".to_owned())?;
    Ok(Backend::folder(folder))
}

/// Deadlines are set request by request; plain HTTP is allowed when the endpoint says so.
fn client_options(spec: &RegionSpec) -> ClientOptions {
    let plain_http = ["endpoint", "aws_endpoint", "azure_storage_endpoint", "base_url"]
        .iter()
        .filter_map(|key| spec.options.get(*key).cloned())
        .chain(
            ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT"]
                .iter()
                .filter_map(|name| std::env::var(name).ok()),
        )
        .any(|endpoint| endpoint.starts_with("http://"));
    ClientOptions::new()
        .with_timeout_disabled()
        .with_connect_timeout(CONNECT_TIMEOUT)
        .with_allow_http(plain_http)
}

/// The library must not retry by itself: one deadline and one count of attempts, ours.
fn no_retries() -> RetryConfig {
    RetryConfig { max_retries: 0, ..RetryConfig::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(url: &str, options: &[(&str, &str)]) -> Result<Region, StoreError> {
        let options = options.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        open_region(&RegionSpec { name: "x".into(), url: url.into(), options: options.collect() })
    }

    #[test]
    fn every_kind_of_store_opens_without_a_request() {
        let key = "c2VjcmV0";
        let aws = [("access_key_id", "k"), ("secret_access_key", "s"), ("region", "eu-central-1")];
        assert!(open("s3://bucket/prefix", &aws).is_ok());
        assert!(open("gs://bucket/prefix", &[("google_skip_signature", "true")]).is_ok());
        assert!(
            open("az://container/prefix", &[("account_name", "a"), ("account_key", key)]).is_ok()
        );
        assert!(open("file:///no/such/folder", &[]).is_ok());
    }

    #[test]
    fn what_cannot_be_opened_is_said() {
        let told =
            |url: &str, options: &[(&str, &str)]| open(url, options).unwrap_err().to_string();
        assert!(told("ftp://x", &[]).contains("unknown kind of store"));
        assert!(told("/srv/archive", &[]).contains("file:///folder"));
        assert!(told("file:///tmp", &[("region", "x")]).contains("no option"));
        assert!(told("s3://bucket", &[("end_point", "x")]).contains("end_point"));
    }
}
