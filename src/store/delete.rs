//! Deleting objects, one by one or many at once. One that is not there counts as deleted. A crash
//! in the middle leaves some of them.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::Ordering::Relaxed;

use futures_util::StreamExt;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};

use super::counts::RequestKind;
use super::region::Backend;
use super::{FailureKind, Region, StoreError};

const DELETE: RequestKind = RequestKind::Delete;
/// Objects given to the library at once: what one request to S3 may name.
const CHUNK: usize = 1000;
/// Single deletions at once, of what could not be deleted together.
const DELETES_AT_ONCE: usize = 16;

impl Region {
    /// Deletes an object; one that is not there is no error.
    ///
    /// # Errors
    /// When the store fails, also after retries.
    pub async fn delete(&self, key: &str) -> Result<(), StoreError> {
        let path = self.path(key);
        let request = || async {
            let store = self.store(DELETE, key).await?;
            self.once(DELETE, key, 0, store.delete(&path)).await
        };
        match self.retry(request).await {
            Err(error) if error.kind != FailureKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Deletes many objects, with as few requests as the store allows. Gives an error for each
    /// object that may still be there; none means that all are gone.
    pub async fn delete_many(&self, keys: &[String]) -> Vec<StoreError> {
        let mut errors = Vec::new();
        for chunk in keys.chunks(CHUNK) {
            if Region::lacks(&self.shared.cannot_delete_many) {
                errors.extend(self.delete_each(chunk).await);
                continue;
            }
            match self.retry(|| self.delete_together(chunk)).await {
                Ok(left) => errors.extend(self.delete_each(&left).await),
                // Some stores know no deletion of many.
                Err(error) if error.kind == FailureKind::Permanent => {
                    tracing::debug!(%error, "deleting one by one from now on");
                    self.shared.cannot_delete_many.store(true, Relaxed);
                    errors.extend(self.delete_each(chunk).await);
                }
                Err(error) => {
                    let failed = |key| self.error("delete", key, error.kind, error.message.clone());
                    errors.extend(chunk.iter().map(|key| failed(key)));
                }
            }
        }
        errors
    }

    /// Where folders are real, removes one that is empty, with what uploads that were cut off left in
    /// it. Nothing depends on it.
    pub async fn remove_emptied_folder(&self, folder: &str) {
        let Backend::Folder(backend) = &self.backend else { return };
        let (backend, inside) = (backend.clone(), self.path(folder).to_string());
        let removal = tokio::task::spawn_blocking(move || backend.remove_emptied(&inside));
        let _ = tokio::time::timeout(self.patience.answer, removal).await;
    }

    /// Gives the keys that the store did not confirm; an error when it confirmed none and said why.
    async fn delete_together(&self, keys: &[String]) -> Result<Vec<String>, StoreError> {
        let Some(first) = keys.first() else { return Ok(Vec::new()) };
        let store = self.store(DELETE, first).await?;
        let at_once = match &self.backend {
            Backend::Cloud(cloud) => cloud.deletes_at_once,
            Backend::Folder(_) => 1,
        };
        self.shared.counters.requests(DELETE, keys.len().div_ceil(at_once) as u64);
        let paths: Vec<Path> = keys.iter().map(|key| self.path(key)).collect();
        let paths = futures_util::stream::iter(paths.into_iter().map(Ok)).boxed();
        let mut answers = store.delete_stream(paths);
        let mut gone = BTreeSet::new();
        let mut failure = None;
        loop {
            let next = async { Ok(answers.next().await) };
            match self.within_time(DELETE, first, self.patience.answer, next).await {
                Ok(None) => break,
                Ok(Some(Ok(path))) => _ = gone.insert(path),
                // Which object it was is not said; the single deletion finds out.
                Ok(Some(Err(object_store::Error::NotFound { .. }))) => {}
                Ok(Some(Err(error))) => failure = Some(self.failed(DELETE, first, &error)),
                Err(error) => {
                    failure = Some(error);
                    break;
                }
            }
        }
        match failure {
            Some(error) if gone.is_empty() => Err(error),
            _ => Ok(keys.iter().filter(|key| !gone.contains(&self.path(key))).cloned().collect()),
        }
    }

    /// Each by itself, with an error of its own. Once the store fails, the rest is not tried: each
    /// would wait as long.
    async fn delete_each(&self, keys: &[String]) -> Vec<StoreError> {
        let failing: Mutex<Option<StoreError>> = Mutex::new(None);
        let failing = &failing;
        let last = || failing.lock().ok().and_then(|last| last.clone());
        // Owned keys: what borrows them here could not be sent to another thread.
        let deletions = keys.iter().cloned().map(|key: String| async move {
            if let Some(error) = last() {
                return Some(self.error("delete", &key, error.kind, error.message));
            }
            let error = self.delete(&key).await.err()?;
            if error.kind == FailureKind::Transient
                && let Ok(mut last) = failing.lock()
            {
                *last = Some(error.clone());
            }
            Some(error)
        });
        futures_util::stream::iter(deletions)
            .buffer_unordered(DELETES_AT_ONCE)
            .filter_map(|error| async { error })
            .collect()
            .await
    }
}
