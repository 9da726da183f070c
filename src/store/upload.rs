//! An upload whose length is not known when it begins, in parts.
//!
//! Small objects become one plain write. A crash in the middle leaves nothing under the object's
//! name; parts of an unfinished upload are dropped by the store's own rules for those.

use bytes::{Bytes, BytesMut};
use object_store::multipart::PartId;
use object_store::{MultipartUpload, ObjectStoreExt, PutPayload};

use super::counts::RequestKind::{Delete, Put};
use super::region::Backend;
use super::{FailureKind, Region, StoreError};

/// Length of every part but the last: some stores want them alike.
pub const PART_SIZE: usize = 8 << 20;

enum Target {
    /// Nothing was sent yet.
    None,
    Folder(Box<dyn MultipartUpload>),
    Cloud {
        id: String,
        parts: Vec<PartId>,
    },
}

/// An upload under way.
pub struct Upload {
    region: Region,
    key: String,
    target: Target,
    buffer: BytesMut,
    /// Bytes sent so far.
    sent: u64,
}

impl Upload {
    pub(super) fn new(region: Region, key: String) -> Upload {
        Upload { region, key, target: Target::None, buffer: BytesMut::new(), sent: 0 }
    }

    /// Adds bytes; returns once they are sent or buffered (at most one part is).
    ///
    /// # Errors
    /// When the store fails, also after retries. The upload is then useless: [`Upload::abort`] it.
    pub async fn write(&mut self, mut bytes: Bytes) -> Result<(), StoreError> {
        while !bytes.is_empty() {
            let take = bytes.len().min(PART_SIZE - self.buffer.len());
            self.buffer.extend_from_slice(&bytes.split_to(take));
            if self.buffer.len() == PART_SIZE {
                let part = std::mem::take(&mut self.buffer).freeze();
                self.send(part).await?;
            }
        }
        Ok(())
    }

    async fn send(&mut self, part: Bytes) -> Result<(), StoreError> {
        let (region, key) = (self.region.clone(), self.key.clone());
        let path = region.path(&key);
        let length = part.len() as u64;
        if matches!(self.target, Target::None) {
            self.target = match &region.backend {
                Backend::Folder(_) => {
                    let store = region.store(Put, &key).await?;
                    Target::Folder(region.once(Put, &key, 0, store.put_multipart(&path)).await?)
                }
                Backend::Cloud(cloud) => {
                    let begin = || region.once(Put, &key, 0, cloud.parts.create_multipart(&path));
                    Target::Cloud { id: region.retry(begin).await?, parts: Vec::new() }
                }
            };
        }
        self.sent += length;
        match (&mut self.target, &region.backend) {
            (Target::Folder(upload), _) => {
                let request = upload.put_part(PutPayload::from(part));
                region.once(Put, &key, length, request).await
            }
            (Target::Cloud { id, parts: sent }, Backend::Cloud(cloud)) => {
                let number = sent.len();
                let id = &*id;
                let request = || {
                    let payload = PutPayload::from(part.clone());
                    let request = cloud.parts.put_part(&path, id, number, payload);
                    region.once(Put, &key, length, request)
                };
                let done = region.retry(request).await?;
                sent.push(done);
                Ok(())
            }
            _ => Err(region.error("write", &key, FailureKind::Permanent, "the upload is over")),
        }
    }

    /// Sends what is left and makes the object appear.
    ///
    /// # Errors
    /// When the store fails, also after retries; the object is then not there, or whole.
    pub async fn finish(mut self) -> Result<(), StoreError> {
        let rest = std::mem::take(&mut self.buffer).freeze();
        let (region, key) = (self.region.clone(), self.key.clone());
        if matches!(self.target, Target::None) {
            return region.put(&key, rest).await.map(|_| ());
        }
        if !rest.is_empty() {
            self.send(rest).await?;
        }
        let path = region.path(&key);
        match (self.target, &region.backend) {
            (Target::Folder(mut upload), _) => {
                // It syncs all of the file.
                let deadline = region.patience.complete.max(region.patience.for_write(self.sent));
                region.within_time(Put, &key, deadline, upload.complete()).await.map(|_| ())
            }
            (Target::Cloud { id, parts }, Backend::Cloud(cloud)) => {
                let complete = || {
                    let request = cloud.parts.complete_multipart(&path, &id, parts.clone());
                    region.complete(&key, request)
                };
                match region.retry(complete).await {
                    Ok(_) => Ok(()),
                    // The first attempt may have worked and its answer been lost (I10).
                    Err(error) => match region.size(&key).await {
                        Ok(Some(size)) if size == self.sent => Ok(()),
                        _ => Err(error),
                    },
                }
            }
            _ => Ok(()),
        }
    }

    /// Gives up and lets the store forget the parts, as far as it answers.
    pub async fn abort(mut self) {
        let path = self.region.path(&self.key);
        match (&mut self.target, &self.region.backend) {
            (Target::Folder(upload), _) => {
                let deadline = self.region.patience.answer;
                let _ = self.region.within_time(Delete, &self.key, deadline, upload.abort()).await;
            }
            (Target::Cloud { id, .. }, Backend::Cloud(cloud)) => {
                let request = cloud.parts.abort_multipart(&path, id);
                let _ = self.region.once(Delete, &self.key, 0, request).await;
            }
            _ => {}
        }
    }
}
