//! Listing objects and folders, page by page: each page has its own deadline and attempts, so a
//! long listing may take its time and a store that hangs is known within seconds.

use futures_util::StreamExt;
use object_store::list::{PaginatedListOptions, PaginatedListStore};
use object_store::path::Path;
use object_store::{ListResult, ObjectMeta, ObjectStore};

use super::counts::RequestKind;
use super::region::{Backend, Cloud};
use super::{FailureKind, Region, StoreError};

const LIST: RequestKind = RequestKind::List;

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

impl Region {
    /// All objects below a folder, in no order.
    ///
    /// # Errors
    /// When the store fails, also after retries.
    pub async fn list(&self, folder: &str) -> Result<Vec<ObjectInfo>, StoreError> {
        let objects = match &self.backend {
            Backend::Cloud(Cloud { pages: Some(pages), .. }) => {
                self.all_pages(pages.as_ref(), folder, false).await?.objects
            }
            _ => self.retry(|| self.list_once(folder)).await?,
        };
        Ok(objects.into_iter().filter_map(|meta| self.info(meta)).collect())
    }

    /// The folders and objects directly in a folder: names of folders, then objects.
    ///
    /// # Errors
    /// When the store fails, also after retries.
    pub async fn list_folder(
        &self,
        folder: &str,
    ) -> Result<(Vec<String>, Vec<ObjectInfo>), StoreError> {
        let found = match &self.backend {
            Backend::Cloud(Cloud { pages: Some(pages), .. }) => {
                self.all_pages(pages.as_ref(), folder, true).await?
            }
            _ => {
                let prefix = self.path(folder);
                let request = || async {
                    let store = self.store(LIST, folder).await?;
                    self.once(LIST, folder, 0, store.list_with_delimiter(Some(&prefix))).await
                };
                self.retry(request).await?
            }
        };
        let mut folders: Vec<String> = found
            .common_prefixes
            .iter()
            .filter_map(|path| path.filename().map(str::to_owned))
            .collect();
        folders.sort_unstable();
        Ok((folders, found.objects.into_iter().filter_map(|meta| self.info(meta)).collect()))
    }

    async fn all_pages(
        &self,
        store: &dyn PaginatedListStore,
        folder: &str,
        only_this_folder: bool,
    ) -> Result<ListResult, StoreError> {
        let prefix = prefix_of(&self.path(folder));
        let mut all = ListResult {
            common_prefixes: Vec::new(),
            objects: Vec::new(),
            extensions: Default::default(),
        };
        let mut token: Option<String> = None;
        loop {
            let request = || {
                let options = PaginatedListOptions {
                    delimiter: only_this_folder.then_some("/".into()),
                    page_token: token.clone(),
                    ..PaginatedListOptions::default()
                };
                self.once(LIST, folder, 0, store.list_paginated(prefix.as_deref(), options))
            };
            let page = self.retry(request).await?;
            all.common_prefixes.extend(page.result.common_prefixes);
            all.objects.extend(page.result.objects);
            match page.page_token {
                None => return Ok(all),
                // It would go on for ever.
                same if same == token => {
                    let message = "the store gives the same page of the listing again";
                    return Err(self.error("list", folder, FailureKind::Permanent, message));
                }
                next => token = next,
            }
        }
    }

    /// A listing that comes in one piece: each object has its deadline.
    async fn list_once(&self, folder: &str) -> Result<Vec<ObjectMeta>, StoreError> {
        let prefix = self.path(folder);
        let store = self.store(LIST, folder).await?;
        self.shared.counters.requests(LIST, 1);
        let mut stream = ObjectStore::list(store.as_ref(), Some(&prefix));
        let mut found = Vec::new();
        loop {
            let next = async { stream.next().await.transpose() };
            match self.within_time(LIST, folder, self.patience.answer, next).await? {
                Some(meta) => found.push(meta),
                None => return Ok(found),
            }
        }
    }

    fn info(&self, meta: ObjectMeta) -> Option<ObjectInfo> {
        let key = self.key_of(&meta.location)?.to_owned();
        Some(ObjectInfo { key, size: meta.size })
    }
}

/// Everything below a folder, and not what lies beside it under a longer name.
fn prefix_of(folder: &Path) -> Option<String> {
    match folder.as_ref() {
        "" => None,
        folder => Some(format!("{folder}/")),
    }
}
