//! One region: requests with deadlines and bounded retries.

use std::future::Future;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::TryStreamExt;
use object_store::local::LocalFileSystem;
use object_store::multipart::MultipartStore;
use object_store::path::Path;
use object_store::{
    GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload,
};

use super::error::{describe, kind_of};
use super::{FailureKind, StoreError, Upload};

/// Time allowed for any request, before its bytes are counted.
const BASE_DEADLINE: Duration = Duration::from_secs(20);
/// The slowest store that still counts as working, in bytes a second.
const SLOWEST_RATE: u64 = 256 << 10;
/// How often a request is tried before its failure is the caller's.
const ATTEMPTS: u32 = 4;
/// The pause before the second attempt; it doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(200);

/// What a write found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// The object was written.
    Written,
    /// It was there already.
    AlreadyThere,
}

/// An object in a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Its key, relative to the region's root.
    pub key: String,
    /// Its length in bytes.
    pub size: u64,
}

impl ObjectInfo {
    /// The last part of the key.
    pub fn file_name(&self) -> &str {
        self.key.rsplit('/').next().unwrap_or(&self.key)
    }
}

/// The library's stores, by what they can do.
#[derive(Clone)]
pub(super) enum Backend {
    /// A local folder.
    Folder { store: Arc<LocalFileSystem>, folder: PathBuf },
    /// A store over HTTP.
    Cloud { store: Arc<dyn ObjectStore>, parts: Arc<dyn MultipartStore> },
}

impl Backend {
    pub(super) fn cloud<S: ObjectStore + MultipartStore>(store: Arc<S>) -> Backend {
        Backend::Cloud { store: store.clone(), parts: store }
    }

    fn store(&self) -> &dyn ObjectStore {
        match self {
            Backend::Folder { store, .. } => store.as_ref(),
            Backend::Cloud { store, .. } => store.as_ref(),
        }
    }
}

/// A region, or a folder in it: keys are relative to its root.
#[derive(Clone)]
pub struct Region {
    name: String,
    url: String,
    pub(super) backend: Backend,
    root: Path,
}

impl std::fmt::Debug for Region {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Region({} at {}/{})", self.name, self.url, self.root)
    }
}

impl Region {
    pub(super) fn new(name: String, url: String, backend: Backend, root: Path) -> Region {
        Region { name, url, backend, root }
    }

    /// A region in a store that somebody else opened.
    pub fn over<S: ObjectStore + MultipartStore>(name: &str, url: &str, store: Arc<S>) -> Region {
        let backend = Backend::cloud(store);
        Region::new(name.to_owned(), url.to_owned(), backend, Path::default())
    }

    /// Its name in the configuration.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its URL in the configuration.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The same region seen from a folder inside it.
    pub fn within(&self, folder: &str) -> Region {
        let root = folder.split('/').fold(self.root.clone(), |path, part| path.join(part));
        Region { root, ..self.clone() }
    }

    pub(super) fn path(&self, key: &str) -> Path {
        key.split('/')
            .filter(|part| !part.is_empty())
            .fold(self.root.clone(), |p, part| p.join(part))
    }

    pub(super) fn error(
        &self,
        operation: &'static str,
        key: &str,
        kind: FailureKind,
        message: impl Into<String>,
    ) -> StoreError {
        StoreError {
            kind,
            region: self.name.clone(),
            operation,
            key: self.path(key).to_string(),
            message: message.into(),
        }
    }

    /// An error that says that an object is not what it should be.
    pub fn damaged(&self, key: &str, message: impl Into<String>) -> StoreError {
        self.error("use", key, FailureKind::Damaged, message)
    }

    /// An error that says that an object is not in this region.
    pub fn missing(&self, key: &str, message: impl Into<String>) -> StoreError {
        self.error("read", key, FailureKind::NotFound, message)
    }

    /// Runs one request with a deadline for `bytes` bytes.
    pub(super) async fn once<T>(
        &self,
        operation: &'static str,
        key: &str,
        bytes: u64,
        request: impl Future<Output = object_store::Result<T>>,
    ) -> Result<T, StoreError> {
        let deadline = BASE_DEADLINE + Duration::from_secs(bytes / SLOWEST_RATE);
        match tokio::time::timeout(deadline, request).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(self.error(operation, key, kind_of(&error), describe(&error))),
            Err(_) => {
                let message = format!("no answer within {} s", deadline.as_secs());
                Err(self.error(operation, key, FailureKind::Transient, message))
            }
        }
    }

    /// Repeats a request while its failure may pass, a bounded number of times.
    pub(super) async fn retry<T, F, R>(&self, mut request: R) -> Result<T, StoreError>
    where
        R: FnMut() -> F,
        F: Future<Output = Result<T, StoreError>>,
    {
        let mut pause = FIRST_PAUSE;
        for _ in 1..ATTEMPTS {
            match request().await {
                Err(error) if error.kind == FailureKind::Transient => {
                    tracing::debug!(%error, "retrying");
                    tokio::time::sleep(crate::jitter::around(pause)).await;
                    pause *= 2;
                }
                outcome => return outcome,
            }
        }
        request().await
    }

    /// Writes an object unless it is there. A write whose outcome is not known is repeated, and
    /// finding the object then is success (invariant I10): a name stands for one content.
    ///
    /// # Errors
    /// When the store fails, also after retries.
    pub async fn put(&self, key: &str, content: Bytes) -> Result<Put, StoreError> {
        self.retry(|| self.put_once(key, content.clone())).await
    }

    /// [`Region::put`] with a single attempt, for callers that have their own rhythm.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn put_once(&self, key: &str, content: Bytes) -> Result<Put, StoreError> {
        use object_store::Error;
        self.check_folder("write", key).await?;
        let bytes = content.len() as u64;
        let path = self.path(key);
        let store = self.backend.store();
        let options = PutOptions::from(PutMode::Create);
        let request = async {
            match store.put_opts(&path, PutPayload::from(content.clone()), options).await {
                Ok(_) => Ok(Some(Put::Written)),
                // Stores say "conflict" also while another request for the name is under way.
                Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) => Ok(None),
                Err(Error::NotImplemented { .. } | Error::NotSupported { .. }) => {
                    if store.head(&path).await.is_ok() {
                        return Ok(Some(Put::AlreadyThere));
                    }
                    store.put(&path, PutPayload::from(content)).await.map(|_| Some(Put::Written))
                }
                Err(error) => Err(error),
            }
        };
        if let Some(put) = self.once("write", key, bytes, request).await? {
            return Ok(put);
        }
        // What the store says is there is looked at, not believed (invariant I10).
        match self.size(key).await? {
            Some(size) if size > 0 || bytes == 0 => Ok(Put::AlreadyThere),
            _ => {
                let message = "the store says that it exists, and it is not there";
                Err(self.error("write", key, FailureKind::Transient, message))
            }
        }
    }

    /// Writes an object whether or not it is there. Only for names that are meant to be
    /// overwritten, and to replace a damaged object.
    ///
    /// # Errors
    /// When the store fails, also after retries.
    pub async fn overwrite(&self, key: &str, content: Bytes) -> Result<(), StoreError> {
        self.check_folder("write", key).await?;
        let path = self.path(key);
        let store = self.backend.store();
        let bytes = content.len() as u64;
        self.retry(|| {
            let request = store.put(&path, PutPayload::from(content.clone()));
            self.once("write", key, bytes, request)
        })
        .await
        .map(|_| ())
    }

    /// A local folder that went away must not come back as an empty one: writing would make it.
    async fn check_folder(&self, operation: &'static str, key: &str) -> Result<(), StoreError> {
        match &self.backend {
            Backend::Folder { folder, .. } if tokio::fs::metadata(folder).await.is_err() => {
                let message =
                    format!("the folder {} is gone; is its disk mounted?", folder.display());
                Err(self.error(operation, key, FailureKind::Transient, message))
            }
            _ => Ok(()),
        }
    }

    /// Starts an upload of unknown length.
    ///
    /// # Errors
    /// When the region's folder is gone.
    pub async fn upload(&self, key: &str) -> Result<Upload, StoreError> {
        self.check_folder("write", key).await?;
        Ok(Upload::new(self.clone(), key.to_owned()))
    }

    /// Reads a whole object.
    ///
    /// # Errors
    /// When it is not there or the store fails, also after retries.
    pub async fn get(&self, key: &str) -> Result<Bytes, StoreError> {
        self.read(key, None, 128 << 20).await
    }

    /// Reads a range of an object.
    ///
    /// # Errors
    /// When it is not there, is shorter, or the store fails, also after retries.
    pub async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let length = range.end.saturating_sub(range.start);
        let bytes = self.read(key, Some(GetRange::Bounded(range)), length).await?;
        if bytes.len() as u64 == length {
            return Ok(bytes);
        }
        let message = format!("{} bytes came instead of {length}", bytes.len());
        Err(self.error("read", key, FailureKind::Damaged, message))
    }

    async fn read(
        &self,
        key: &str,
        range: Option<GetRange>,
        expected: u64,
    ) -> Result<Bytes, StoreError> {
        let path = self.path(key);
        self.retry(|| {
            let options = GetOptions { range: range.clone(), ..GetOptions::default() };
            let request =
                async { self.backend.store().get_opts(&path, options).await?.bytes().await };
            self.once("read", key, expected, request)
        })
        .await
    }

    /// Reads the last `length` bytes of an object, or all of a shorter one, and tells its size.
    ///
    /// # Errors
    /// When it is not there or the store fails, also after retries.
    pub async fn get_tail(&self, key: &str, length: u64) -> Result<(Bytes, u64), StoreError> {
        let path = self.path(key);
        let outcome = self.retry(|| {
            let request = async {
                let range = Some(GetRange::Suffix(length));
                let options = GetOptions { range, ..GetOptions::default() };
                let result = self.backend.store().get_opts(&path, options).await?;
                let size = result.meta.size;
                Ok((result.bytes().await?, size))
            };
            self.once("read", key, length, request)
        });
        match outcome.await {
            // Azure knows no ranges from the end.
            Err(error) if error.kind == FailureKind::Permanent => {
                let Some(size) = self.size(key).await? else { return Err(error) };
                let bytes = self.get_range(key, size.saturating_sub(length)..size).await?;
                Ok((bytes, size))
            }
            outcome => outcome,
        }
    }

    /// The size of an object, or `None` when it is not there.
    ///
    /// # Errors
    /// When the store fails, also after retries.
    pub async fn size(&self, key: &str) -> Result<Option<u64>, StoreError> {
        let path = self.path(key);
        let outcome =
            self.retry(|| self.once("look up", key, 0, self.backend.store().head(&path))).await;
        match outcome {
            Ok(meta) => Ok(Some(meta.size)),
            Err(error) if error.kind == FailureKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// All objects below a folder, in no order.
    ///
    /// # Errors
    /// When the store fails, also after retries.
    pub async fn list(&self, folder: &str) -> Result<Vec<ObjectInfo>, StoreError> {
        let prefix = self.path(folder);
        self.check_folder("list", folder).await?;
        self.retry(|| {
            let request = async {
                // A stream of pages; a deadline for all of them that allows a million objects.
                let stream = self.backend.store().list(Some(&prefix));
                let found: Vec<_> = stream.try_collect().await?;
                Ok(found.into_iter().filter_map(|meta| self.info(meta)).collect())
            };
            self.once("list", folder, 64 << 20, request)
        })
        .await
    }

    /// The folders and objects directly in a folder: names of folders, then objects.
    ///
    /// # Errors
    /// When the store fails, also after retries.
    pub async fn list_folder(
        &self,
        folder: &str,
    ) -> Result<(Vec<String>, Vec<ObjectInfo>), StoreError> {
        let prefix = self.path(folder);
        self.check_folder("list", folder).await?;
        let found = self
            .retry(|| {
                let request = self.backend.store().list_with_delimiter(Some(&prefix));
                self.once("list", folder, 16 << 20, request)
            })
            .await?;
        let mut folders: Vec<String> = found
            .common_prefixes
            .iter()
            .filter_map(|path| path.filename().map(str::to_owned))
            .collect();
        folders.sort_unstable();
        Ok((folders, found.objects.into_iter().filter_map(|meta| self.info(meta)).collect()))
    }

    fn info(&self, meta: object_store::ObjectMeta) -> Option<ObjectInfo> {
        let full = meta.location.as_ref();
        let key = match self.root.as_ref() {
            "" => full,
            root => full.strip_prefix(root)?.strip_prefix('/')?,
        };
        Some(ObjectInfo { key: key.to_owned(), size: meta.size })
    }

    /// Deletes an object; one that is not there is no error.
    ///
    /// # Errors
    /// When the store fails, also after retries.
    pub async fn delete(&self, key: &str) -> Result<(), StoreError> {
        let path = self.path(key);
        let outcome =
            self.retry(|| self.once("delete", key, 0, self.backend.store().delete(&path))).await;
        match outcome {
            Err(error) if error.kind != FailureKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}
