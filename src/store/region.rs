//! One region: what all its requests share. Requests themselves are in `write`, `read`, `list` and
//! `delete`; each attempt has deadlines ([`Patience`]), is counted, and is repeated a bounded number
//! of times while its failure may pass.
//!
//! Nothing is cached: what a read returns came from the store for that read.

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use object_store::list::PaginatedListStore;
use object_store::multipart::MultipartStore;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};

use super::counts::{Counters, RequestKind};
use super::error::sort;
use super::folder::Folder;
use super::patience::FIRST_PAUSE;
use super::{FailureKind, Patience, RequestCounts, StoreError, Upload};

/// The library's stores, by what they can do.
#[derive(Clone)]
pub(super) enum Backend {
    /// A local folder.
    Folder(Arc<Folder>),
    /// A store over HTTP.
    Cloud(Cloud),
}

/// A store over HTTP, and what it can do beyond single requests.
#[derive(Clone)]
pub(super) struct Cloud {
    pub(super) store: Arc<dyn ObjectStore>,
    pub(super) parts: Arc<dyn MultipartStore>,
    /// Listings page by page; without it they come in one piece.
    pub(super) pages: Option<Arc<dyn PaginatedListStore>>,
    /// How many objects one request deletes.
    pub(super) deletes_at_once: usize,
}

impl Backend {
    pub(super) fn folder(path: PathBuf) -> Backend {
        Backend::Folder(Arc::new(Folder::new(path)))
    }

    pub(super) fn cloud<S>(store: S, deletes_at_once: usize) -> Backend
    where
        S: ObjectStore + MultipartStore + PaginatedListStore,
    {
        let store = Arc::new(store);
        let (parts, pages) = (store.clone(), Some(store.clone() as Arc<dyn PaginatedListStore>));
        Backend::Cloud(Cloud { store, parts, pages, deletes_at_once })
    }
}

/// What is known of a region, by all its clones.
#[derive(Debug, Default)]
pub(super) struct Shared {
    pub(super) counters: Counters,
    /// The store said that it cannot create an object only if it is not there.
    pub(super) cannot_create: AtomicBool,
    /// The store said that it cannot delete several objects in one request.
    pub(super) cannot_delete_many: AtomicBool,
}

/// A region, or a folder in it: keys are relative to its root.
#[derive(Clone)]
pub struct Region {
    name: String,
    url: String,
    pub(super) backend: Backend,
    root: Path,
    pub(super) patience: Patience,
    pub(super) shared: Arc<Shared>,
}

impl std::fmt::Debug for Region {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Region({} at {}/{})", self.name, self.url, self.root)
    }
}

impl Region {
    pub(super) fn new(name: String, url: String, backend: Backend, root: Path) -> Region {
        let (patience, shared) = (Patience::default(), Arc::default());
        Region { name, url, backend, root, patience, shared }
    }

    /// A region in a store that somebody else opened.
    pub fn over<S: ObjectStore + MultipartStore>(name: &str, url: &str, store: Arc<S>) -> Region {
        let parts = store.clone();
        let backend = Backend::Cloud(Cloud { store, parts, pages: None, deletes_at_once: 1 });
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

    /// The same region with other deadlines and attempts.
    pub fn with_patience(&self, patience: Patience) -> Region {
        Region { patience, ..self.clone() }
    }

    /// Requests sent so far, by all clones of the region.
    pub fn requests(&self) -> RequestCounts {
        self.shared.counters.snapshot()
    }

    pub(super) fn path(&self, key: &str) -> Path {
        key.split('/')
            .filter(|part| !part.is_empty())
            .fold(self.root.clone(), |p, part| p.join(part))
    }

    /// The key of an object whose full path is given; `None` if it lies elsewhere.
    pub(super) fn key_of<'a>(&self, full: &'a Path) -> Option<&'a str> {
        match self.root.as_ref() {
            "" => Some(full.as_ref()),
            root => full.as_ref().strip_prefix(root)?.strip_prefix('/'),
        }
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

    /// An error of the library, said of a request.
    pub(super) fn failed(
        &self,
        kind: RequestKind,
        key: &str,
        error: &object_store::Error,
    ) -> StoreError {
        let (failure, message) = sort(error);
        self.error(kind.verb(), key, failure, message)
    }

    fn too_late(&self, kind: RequestKind, key: &str, deadline: Duration) -> StoreError {
        let message = format!("no answer within {} s", deadline.as_secs_f32());
        self.error(kind.verb(), key, FailureKind::Transient, message)
    }

    /// The store, once it is known to be there. Each request begins with it.
    pub(super) async fn store(
        &self,
        kind: RequestKind,
        key: &str,
    ) -> Result<Arc<dyn ObjectStore>, StoreError> {
        self.find_store()
            .await
            .map_err(|problem| self.error(kind.verb(), key, FailureKind::Transient, problem))
    }

    async fn find_store(&self) -> Result<Arc<dyn ObjectStore>, String> {
        let folder = match &self.backend {
            Backend::Cloud(cloud) => return Ok(cloud.store.clone()),
            Backend::Folder(folder) => folder.clone(),
        };
        let open = tokio::task::spawn_blocking(move || folder.open());
        match tokio::time::timeout(self.patience.answer, open).await {
            Ok(Ok(store)) => Ok(store?),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!(
                "its disk does not answer within {} s",
                self.patience.answer.as_secs_f32()
            )),
        }
    }

    /// Why the region's folder cannot be used now, if it is a local folder and cannot.
    pub fn missing_folder(&self) -> Option<String> {
        match &self.backend {
            Backend::Cloud(_) => None,
            Backend::Folder(folder) => folder.open().err(),
        }
    }

    /// Waits for something that a request needs, until its deadline.
    pub(super) async fn within_time<T>(
        &self,
        kind: RequestKind,
        key: &str,
        deadline: Duration,
        future: impl Future<Output = object_store::Result<T>>,
    ) -> Result<T, StoreError> {
        match tokio::time::timeout(deadline, future).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(self.failed(kind, key, &error)),
            Err(_) => Err(self.too_late(kind, key, deadline)),
        }
    }

    /// Sends one request that carries `bytes` bytes, and waits for its answer to begin.
    pub(super) async fn once<T>(
        &self,
        kind: RequestKind,
        key: &str,
        bytes: u64,
        request: impl Future<Output = object_store::Result<T>>,
    ) -> Result<T, StoreError> {
        self.shared.counters.requests(kind, 1);
        self.shared.counters.sent(bytes);
        let deadline = match kind {
            RequestKind::Put => self.patience.for_write(bytes),
            _ => self.patience.answer,
        };
        self.within_time(kind, key, deadline, request).await
    }

    /// Sends the request that puts an upload's parts together.
    pub(super) async fn complete<T>(
        &self,
        key: &str,
        request: impl Future<Output = object_store::Result<T>>,
    ) -> Result<T, StoreError> {
        self.shared.counters.requests(RequestKind::Put, 1);
        self.within_time(RequestKind::Put, key, self.patience.complete, request).await
    }

    /// Repeats a request while its failure may pass, a bounded number of times.
    pub(super) async fn retry<T, F, R>(&self, mut request: R) -> Result<T, StoreError>
    where
        R: FnMut() -> F,
        F: Future<Output = Result<T, StoreError>>,
    {
        let mut pause = FIRST_PAUSE;
        for _ in 1..self.patience.attempts {
            match request().await {
                Err(error) if error.kind == FailureKind::Transient => {
                    // A disk that is not mounted does not come back within the pauses.
                    if self.find_store().await.is_err() {
                        return Err(error);
                    }
                    tracing::debug!(%error, "retrying");
                    tokio::time::sleep(crate::jitter::around(pause)).await;
                    pause *= 2;
                }
                outcome => return outcome,
            }
        }
        request().await
    }

    /// Whether the store is known to refuse the creation of only what is absent.
    pub fn refuses_creation(&self) -> bool {
        Region::lacks(&self.shared.cannot_create)
    }

    /// Whether the store was found to lack something, which is not asked for again.
    pub(super) fn lacks(flag: &AtomicBool) -> bool {
        flag.load(Relaxed)
    }

    /// Starts an upload of unknown length.
    ///
    /// # Errors
    /// When the region's folder is gone.
    pub async fn upload(&self, key: &str) -> Result<Upload, StoreError> {
        self.store(RequestKind::Put, key).await?;
        Ok(Upload::new(self.clone(), key.to_owned()))
    }

    /// The size of an object, or `None` when it is not there.
    ///
    /// # Errors
    /// When the store fails, also after retries.
    pub async fn size(&self, key: &str) -> Result<Option<u64>, StoreError> {
        self.retry(|| self.size_once(key)).await
    }

    pub(super) async fn size_once(&self, key: &str) -> Result<Option<u64>, StoreError> {
        let store = self.store(RequestKind::Head, key).await?;
        match self.once(RequestKind::Head, key, 0, store.head(&self.path(key))).await {
            Ok(meta) => Ok(Some(meta.size)),
            Err(error) if error.kind == FailureKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}
