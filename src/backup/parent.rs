//! The backup that an incremental or differential one builds on: which one, what it has under a
//! path, and its manifest for the server.
//!
//! Its `files.idx` is held as bytes, the hashes of its blocks are read pack by pack as the stream
//! comes to files that lie in them, and only some of them are held.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;

use super::parent_file::ParentFile;
use super::{BackupError, BackupType};
use crate::pg::{Connection, PgError};
use crate::repo::{
    BackupInfo, BlockHashes, ContentKey, Extent, FileKind, FileLookup, PackEntry, files_idx_key,
    manifest_key,
};
use crate::store::{Catalog, ReadError, Region, Regions, read_block_hashes};

/// Hashes of packs that are held at once.
const HELD_HASHES: usize = 64 << 20;
/// Bytes of a manifest that are read together.
const MANIFEST_PART: u64 = 4 << 20;

/// The backup that one of this type can build on: of those that most regions have, the newest.
pub(super) fn choose(catalog: &Catalog, kind: BackupType, major: u32) -> Option<BackupInfo> {
    let fits = |info: &BackupInfo| {
        info.postgres_major == major
            && (kind == BackupType::Incremental || info.kind == BackupType::Full)
    };
    let candidates = catalog.backups.values().filter(|(info, _)| fits(info));
    let best = candidates.max_by_key(|(info, regions)| (regions.len(), info.start_time));
    best.map(|(info, _)| info.clone())
}

/// An opened parent.
pub(super) struct Parent {
    pub(super) info: BackupInfo,
    regions: Regions,
    key: ContentKey,
    lookup: FileLookup,
    /// The packs' hashes that were used last, newest at the end.
    held: VecDeque<(u32, Arc<BlockHashes>)>,
}

impl Parent {
    /// Reads its index; `regions` are those at the lineage's folder that have it.
    pub(super) async fn open(
        info: BackupInfo,
        regions: Regions,
        key: ContentKey,
    ) -> Result<Parent, BackupError> {
        let object = &files_idx_key(&info.label);
        let (expected, hash_key) = (&info.files_idx, &key);
        let read = |region: Region| async move { region.get(object).await };
        let open = |region: Region, bytes: Bytes| async move {
            if bytes.len() as u64 != expected.size || hash_key.hash(&bytes) != expected.hash {
                return Err(region.damaged(object, "it does not have the hash in backup.json"));
            }
            let opened = tokio::task::spawn_blocking(move || FileLookup::open(bytes)).await;
            match opened {
                Ok(Ok(lookup)) => Ok(lookup),
                Ok(Err(error)) => Err(region.damaged(object, error.to_string())),
                Err(error) => Err(region.damaged(object, error.to_string())),
            }
        };
        let lookup = regions.read_soonest(read, open).await?;
        Ok(Parent { info, regions, key, lookup, held: VecDeque::new() })
    }

    /// The packs that its files lie in.
    pub(super) fn into_packs(self) -> Vec<PackEntry> {
        self.lookup.into_packs()
    }

    /// What it has under a path; with the hashes of its blocks, if those are asked for.
    pub(super) async fn file(
        &mut self,
        path: &str,
        with_hashes: bool,
    ) -> Result<Option<ParentFile>, BackupError> {
        let found = self.lookup.find(path).map_err(|error| {
            BackupError::Parent(self.info.label.clone(), format!("files.idx: {error}"))
        })?;
        let Some(FileKind::File { extents, .. }) = found.map(|file| file.kind) else {
            return Ok(None);
        };
        let mut packs: Vec<u32> = Vec::new();
        if with_hashes {
            let stored = extents.iter().filter_map(|extent| match extent {
                Extent::Stored { pack, .. } => Some(*pack),
                Extent::Zeros { .. } => None,
            });
            packs.extend(stored);
            packs.sort_unstable();
            packs.dedup();
        }
        let mut tables = Vec::with_capacity(packs.len());
        for pack in &packs {
            tables.push(self.hashes(*pack).await);
        }
        let find =
            |pack: u32, frame, offset| tables[packs.binary_search(&pack).ok()?].find(frame, offset);
        Ok(Some(ParentFile::new(&extents, find)))
    }

    /// The hashes of a pack's blocks; none when no region gives them: then its blocks are stored
    /// again.
    async fn hashes(&mut self, pack: u32) -> Arc<BlockHashes> {
        if let Some(place) = self.held.iter().position(|(held, _)| *held == pack)
            && let Some(entry) = self.held.remove(place)
        {
            let hashes = entry.1.clone();
            self.held.push_back(entry);
            return hashes;
        }
        let entry = &self.lookup.packs()[pack as usize];
        let hashes = match read_block_hashes(&self.regions, entry).await {
            Ok(hashes) => Arc::new(hashes),
            Err(error) => {
                tracing::warn!(
                    "blocks in pack {} of {} are stored again: {error}",
                    entry.number,
                    entry.label
                );
                Arc::default()
            }
        };
        self.held.push_back((pack, hashes.clone()));
        let memory = |held: &VecDeque<(u32, Arc<BlockHashes>)>| -> usize {
            held.iter().map(|(_, hashes)| hashes.memory()).sum()
        };
        while self.held.len() > 1 && memory(&self.held) > HELD_HASHES {
            self.held.pop_front();
        }
        hashes
    }

    /// Gives the server its manifest.
    pub(super) async fn upload_manifest(
        &self,
        connection: &mut Connection,
    ) -> Result<(), UploadError> {
        let object = &manifest_key(&self.info.label);
        let expected = &self.info.backup_manifest;
        connection.begin_manifest().await?;
        let mut hasher = self.key.hasher();
        let mut at = 0;
        while at < expected.size {
            let range = at..expected.size.min(at + MANIFEST_PART);
            at = range.end;
            let read = |region: Region| {
                let range = range.clone();
                async move { region.get_range(object, range).await }
            };
            let part = self.regions.read_soonest(read, |_, part| async move { Ok(part) }).await?;
            hasher.update(&part);
            if at == expected.size && hasher.finish() != expected.hash {
                return Err(UploadError::Damaged);
            }
            connection.put_manifest(&part).await?;
        }
        Ok(connection.end_manifest().await?)
    }
}

/// Why the server has not got a manifest.
#[derive(Debug, thiserror::Error)]
pub(super) enum UploadError {
    #[error(transparent)]
    Server(#[from] PgError),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("the parent's backup_manifest is damaged")]
    Damaged,
}
