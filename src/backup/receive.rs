//! Reads a BASE_BACKUP stream to its end: files into frames, frames into packs, packs into regions.

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::fanout::Fanout;
use super::incremental::{HeaderReader, plain_label, stands_for};
use super::packer::{NewFile, Packer, RawFrame};
use super::packs::{Compressing, compress, write_packs};
use super::parent::Parent;
use super::tar::{TarEntry, TarEvent, TarKind, TarReader};
use super::{BackupError, Progress, TarError};
use crate::pg::{BackupEvent, BackupStream, PgError};
use crate::repo::{
    BackupLabel, ChangesFrom, ContentHasher, ContentKey, PackEntry, StoredObject, manifest_key,
};
use crate::store::Region;
use crate::wal::Lsn;

/// Checksum failures that are noted by name; the server itself stops at five a file.
const MAX_FAILURES: usize = 1000;
/// PostgreSQL's name of the file that says where recovery begins.
const BACKUP_LABEL: &str = "backup_label";
/// The longest one that is believed; they have some hundred bytes.
const MAX_LABEL: u64 = 64 << 10;
/// Folders of relations: what of them an incremental backup sends as a whole is new.
const RELATIONS: [&str; 3] = ["base/", "global/", "pg_tblspc/"];

/// What the stream gave.
pub(super) struct Received {
    pub(super) packer: Packer,
    pub(super) packs: Vec<PackEntry>,
    pub(super) fanout: Fanout,
    pub(super) older_packs: Vec<PackEntry>,
    pub(super) manifest: StoredObject,
    pub(super) stop_lsn: Lsn,
    pub(super) checksum_failures: Vec<String>,
}

/// What is being received.
enum Stage {
    Nothing,
    Archive(TarReader, String),
    Manifest(u64, Box<ContentHasher>),
}

/// The entry of an archive whose content comes.
enum Content {
    /// It goes into frames as it is.
    Plain,
    /// The header of a file of changed blocks.
    Header(HeaderReader, TarEntry),
    /// The backup label, which is changed.
    Label(Vec<u8>, TarEntry),
}

type Written = Result<(Vec<PackEntry>, Fanout), BackupError>;

/// Frames on their way to the regions.
struct Frames {
    key: ContentKey,
    level: i32,
    sender: mpsc::Sender<Compressing>,
    writer: JoinHandle<Written>,
}

impl Frames {
    fn new(regions: &[Region], label: &BackupLabel, key: &ContentKey, level: i32) -> Frames {
        let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        let (sender, frames) = mpsc::channel::<Compressing>(2 * cores);
        let fanout = Fanout::new(regions);
        let writer = tokio::spawn(write_packs(frames, fanout, label.clone(), key.clone()));
        Frames { key: key.clone(), level, sender, writer }
    }

    /// Gives frames to the compression pool; `false` when nobody takes the results any more.
    async fn hand_over(&self, frames: impl IntoIterator<Item = RawFrame>) -> bool {
        for frame in frames {
            let compressing = compress(frame, &self.key, self.level);
            if self.sender.send(compressing).await.is_err() {
                return false;
            }
        }
        true
    }

    /// Waits until all packs are written.
    async fn finish(self) -> Written {
        drop(self.sender);
        self.writer.await.map_err(std::io::Error::other)?
    }
}

/// Files into the packer.
struct Files<'a> {
    packer: Packer,
    parent: Option<Parent>,
    changes_from: Option<ChangesFrom>,
    content: Content,
    full: Vec<RawFrame>,
    progress: &'a Progress,
}

/// What a backup is received into.
pub(super) struct Reception<'a> {
    pub(super) regions: &'a [Region],
    pub(super) label: &'a BackupLabel,
    pub(super) key: &'a ContentKey,
    pub(super) level: i32,
    /// The parent, and how it is found out what changed since.
    pub(super) parent: Option<(Parent, ChangesFrom)>,
    pub(super) progress: &'a Progress,
}

impl Reception<'_> {
    /// Reads the whole stream.
    ///
    /// # Errors
    /// When it breaks, makes no sense, or no region is left.
    pub(super) async fn run(self, mut stream: BackupStream) -> Result<Received, BackupError> {
        let Reception { regions, label, key, level, parent, progress } = self;
        let mut frames = Some(Frames::new(regions, label, key, level));
        let (parent, changes_from) = parent.unzip();
        let mut files = Files {
            packer: Packer::new(key.clone()),
            parent,
            changes_from,
            content: Content::Plain,
            full: Vec::new(),
            progress,
        };
        let mut packed = None;
        let mut stage = Stage::Nothing;
        let mut checksum_failures = Vec::new();
        loop {
            match stream.next().await? {
                BackupEvent::Archive(tablespace) => {
                    end_archive(&stage)?;
                    let prefix = tablespace.map(|oid| format!("pg_tblspc/{oid}/"));
                    stage = Stage::Archive(TarReader::default(), prefix.unwrap_or_default());
                }
                BackupEvent::Data(bytes) => match &mut stage {
                    Stage::Archive(tar, prefix) => {
                        let full = files.take(bytes, tar, prefix).await?;
                        let Some(taking) = &frames else { continue };
                        if !full.is_empty()
                            && !taking.hand_over(full).await
                            && let Some(frames) = frames.take()
                        {
                            return Err(ended_early(frames.finish().await));
                        }
                    }
                    Stage::Manifest(size, hasher) => {
                        *size += bytes.len() as u64;
                        hasher.update(&bytes);
                        if let Some((_, fanout)) = &mut packed {
                            Fanout::write(fanout, &bytes).await;
                        }
                    }
                    Stage::Nothing => {
                        return Err(PgError::Protocol("data of nothing".into()).into());
                    }
                },
                BackupEvent::Manifest => {
                    end_archive(&stage)?;
                    stage = Stage::Manifest(0, Box::new(key.hasher()));
                    files.packer.end_file();
                    let Some(frames) = frames.take() else { continue };
                    frames.hand_over(files.packer.end_frame()).await;
                    let mut done = frames.finish().await?;
                    done.1.begin(&manifest_key(label)).await;
                    packed = Some(done);
                }
                BackupEvent::Warning(warning) => {
                    tracing::warn!("server: {warning}");
                    let about_checksums = warning.message.contains("checksum");
                    if about_checksums && checksum_failures.len() < MAX_FAILURES {
                        checksum_failures.push(warning.message);
                    }
                }
                BackupEvent::End { stop, checksum_error } => {
                    if let Some(error) = checksum_error
                        && checksum_failures.is_empty()
                    {
                        checksum_failures.push(error.message);
                    }
                    let (Some((packs, mut fanout)), Stage::Manifest(size, hasher)) =
                        (packed, stage)
                    else {
                        return Err(PgError::Protocol("the backup has no manifest".into()).into());
                    };
                    fanout.end().await;
                    return Ok(Received {
                        packer: files.packer,
                        packs,
                        fanout,
                        older_packs: files.parent.map(Parent::into_packs).unwrap_or_default(),
                        manifest: StoredObject { size, hash: hasher.finish() },
                        stop_lsn: stop,
                        checksum_failures,
                    });
                }
            }
        }
    }
}

/// Only the writer can have ended the frames, and it says why.
fn ended_early(written: Written) -> BackupError {
    match written {
        Err(error) => error,
        Ok(_) => PgError::Protocol("the backup ended early".into()).into(),
    }
}

fn end_archive(stage: &Stage) -> Result<(), BackupError> {
    match stage {
        Stage::Archive(tar, _) => Ok(tar.finish()?),
        _ => Ok(()),
    }
}

impl Files<'_> {
    /// Takes a chunk of an archive; gives the frames that became full.
    async fn take(
        &mut self,
        mut bytes: Bytes,
        tar: &mut TarReader,
        prefix: &str,
    ) -> Result<Vec<RawFrame>, BackupError> {
        while let Some(event) = tar.next(&mut bytes)? {
            match event {
                // The folder that the archive is of.
                TarEvent::Entry(entry) if entry.path.is_empty() => {}
                TarEvent::Entry(mut entry) => {
                    entry.path.insert_str(0, prefix);
                    self.begin(entry).await?;
                }
                TarEvent::Data(data) => self.data(data).await?,
            }
        }
        Ok(std::mem::take(&mut self.full))
    }

    async fn begin(&mut self, entry: TarEntry) -> Result<(), BackupError> {
        self.content = Content::Plain;
        let is_incremental = self.changes_from == Some(ChangesFrom::WalSummaries);
        match entry.kind {
            TarKind::Directory => self.packer.directory(&entry.path, entry.mode),
            // Links to tablespaces are made anew by a restore.
            TarKind::Link => {}
            TarKind::File if is_incremental && entry.path == BACKUP_LABEL => {
                if entry.size > MAX_LABEL {
                    return Err(TarError(format!("{BACKUP_LABEL} has {} bytes", entry.size)).into());
                }
                self.content = Content::Label(Vec::new(), entry);
            }
            TarKind::File => {
                let of = stands_for(&entry.path).filter(|_| is_incremental);
                match of {
                    Some(path) => {
                        let reader = HeaderReader::new(path, entry.size);
                        self.content = Content::Header(reader, entry);
                    }
                    None => {
                        let with_hashes = !is_incremental
                            || !RELATIONS.iter().any(|folder| entry.path.starts_with(folder));
                        let parent = match &mut self.parent {
                            Some(parent) if with_hashes => parent.file(&entry.path, true).await?,
                            _ => None,
                        };
                        self.begin_plain(entry, parent);
                    }
                }
            }
        }
        Ok(())
    }

    fn begin_plain(&mut self, entry: TarEntry, parent: Option<super::parent_file::ParentFile>) {
        let TarEntry { path, mode, mtime, size, .. } = entry;
        self.packer.begin(NewFile { path, mode, mtime, size, sent: None, parent });
    }

    async fn data(&mut self, mut data: Bytes) -> Result<(), BackupError> {
        match &mut self.content {
            Content::Plain => {
                self.progress.add(data.len() as u64);
                self.packer.data(&data, &mut self.full);
            }
            Content::Label(label, entry) => {
                label.extend_from_slice(&data);
                if label.len() as u64 == entry.size {
                    let label = plain_label(label);
                    let entry = TarEntry { size: label.len() as u64, ..entry.clone() };
                    self.begin_plain(entry, None);
                    self.packer.data(&label, &mut self.full);
                }
            }
            Content::Header(reader, entry) => {
                let Some(changed) = reader.take(&mut data)? else { return Ok(()) };
                let path = reader.path().to_owned();
                let (mode, mtime) = (entry.mode, entry.mtime);
                let parent = match &mut self.parent {
                    Some(parent) => parent.file(&path, false).await?,
                    None => None,
                };
                if parent.is_none() && changed.blocks.len() as u64 * 8192 != changed.size {
                    return Err(TarError(format!("{path}: the parent has no such file")).into());
                }
                self.progress.add(changed.size);
                let sent = Some(changed.blocks);
                self.packer.begin(NewFile { path, mode, mtime, size: changed.size, sent, parent });
                self.content = Content::Plain;
                self.packer.data(&data, &mut self.full);
            }
        }
        Ok(())
    }
}
