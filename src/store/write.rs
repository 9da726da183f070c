//! Writing whole objects.
//!
//! A name stands for one content (invariant I2), so what is there already is not written again. To
//! create only what is absent is one request where the store knows how; nothing depends on it:
//! stores that ignore the condition overwrite the object with the same content, and stores that
//! refuse it are asked for the object's size first, from then on.
//!
//! A crash in the middle, or an answer that is lost, leaves no object or the whole one. The next
//! attempt finds out (invariant I10). An object of another length than ours is the same content
//! compressed otherwise, or a torn one: ours replaces it, and its length is read back.

use std::sync::atomic::Ordering::Relaxed;

use bytes::Bytes;
use object_store::{ObjectStoreExt, PutMode, PutOptions, PutPayload};

use super::counts::RequestKind;
use super::error::cannot_create;
use super::{FailureKind, Region, StoreError};

/// What a write found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// The object was written.
    Written,
    /// It was there already.
    AlreadyThere,
}

/// What came of creating an object.
enum Creation {
    Done,
    /// The store says that it is there.
    Exists,
    /// The store cannot create only what is absent.
    Unknown,
}

impl Region {
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
        let length = content.len() as u64;
        let mut refused = Region::lacks(&self.shared.cannot_create);
        if !refused {
            match self.create(key, content.clone()).await? {
                Creation::Done => return Ok(Put::Written),
                Creation::Exists => {}
                Creation::Unknown => {
                    self.shared.cannot_create.store(true, Relaxed);
                    refused = true;
                }
            }
        }
        // What the store says is there is looked at, not believed (invariant I10).
        match self.size_once(key).await? {
            Some(size) if size == length => Ok(Put::AlreadyThere),
            Some(size) => {
                tracing::warn!(
                    region = self.name(),
                    object = self.path(key).as_ref(),
                    "there are {size} bytes where {length} are to be: written again"
                );
                self.replace(key, content).await.map(|()| Put::Written)
            }
            None if refused => self.overwrite_once(key, content).await.map(|()| Put::Written),
            None => {
                // Perhaps another request for the name is under way.
                let message = "the store says that it exists, and it is not there";
                Err(self.error("write", key, FailureKind::Transient, message))
            }
        }
    }

    async fn create(&self, key: &str, content: Bytes) -> Result<Creation, StoreError> {
        use object_store::Error;
        let store = self.store(RequestKind::Put, key).await?;
        let path = self.path(key);
        let length = content.len() as u64;
        let request = async {
            let options = PutOptions::from(PutMode::Create);
            match store.put_opts(&path, PutPayload::from(content), options).await {
                Ok(_) => Ok(Creation::Done),
                // Stores say "conflict" also while another request for the name is under way.
                Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) => {
                    Ok(Creation::Exists)
                }
                Err(error) if cannot_create(&error) => Ok(Creation::Unknown),
                Err(error) => Err(error),
            }
        };
        self.once(RequestKind::Put, key, length, request).await
    }

    /// Writes whatever is there, and looks whether it arrived whole.
    async fn replace(&self, key: &str, content: Bytes) -> Result<(), StoreError> {
        let length = content.len() as u64;
        self.overwrite_once(key, content).await?;
        match self.size_once(key).await? {
            Some(size) if size == length => Ok(()),
            found => {
                let found = found.map_or("nothing".to_owned(), |size| format!("{size} bytes"));
                let message = format!("{length} bytes were written, and {found} is there");
                Err(self.error("write", key, FailureKind::Transient, message))
            }
        }
    }

    async fn overwrite_once(&self, key: &str, content: Bytes) -> Result<(), StoreError> {
        let store = self.store(RequestKind::Put, key).await?;
        let path = self.path(key);
        let length = content.len() as u64;
        let request = store.put(&path, PutPayload::from(content));
        self.once(RequestKind::Put, key, length, request).await.map(|_| ())
    }

    /// Writes an object whether or not it is there. Only for names that are meant to be
    /// overwritten, and to replace a damaged object.
    ///
    /// # Errors
    /// When the store fails, also after retries.
    pub async fn overwrite(&self, key: &str, content: Bytes) -> Result<(), StoreError> {
        self.retry(|| self.overwrite_once(key, content.clone())).await
    }
}
