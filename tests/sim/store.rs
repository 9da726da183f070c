//! Object stores with faults: in memory, shared by all archivers, each behind its fence.
//!
//! What was stored stays ("forget nothing"). Everything else may happen to a request, as the seed,
//! the key and the number of the attempt will have it: it is slow, fails before or after it was
//! carried out, hangs with or without having been carried out, or lands although nobody waits for
//! it any more.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::BoxStream;
use futures_util::{StreamExt, TryStreamExt};
use object_store::memory::InMemory;
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartId, MultipartUpload,
    ObjectMeta, ObjectStore, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult,
    Result,
};

use crate::dice::{Dice, mix, number_of};
use crate::process::Fence;

/// What a region does to requests; chances are in a hundred.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Faults {
    pub latency_ms: (u64, u64),
    pub fail_before: u64,
    pub fail_after: u64,
    pub hang: u64,
    /// A write is refused with "already exists" although nothing is there.
    pub says_exists: u64,
    /// A write is answered with success and not carried out.
    pub lies: u64,
    /// Bytes a second; 0 without limit.
    pub rate: u64,
    /// How it refuses.
    pub refusal: Refusal,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    Unavailable,
    Denied,
}

impl Faults {
    pub const NONE: Faults = Faults {
        latency_ms: (1, 30),
        fail_before: 0,
        fail_after: 0,
        hang: 0,
        says_exists: 0,
        lies: 0,
        rate: 0,
        refusal: Refusal::Unavailable,
    };
}

/// A region's content and what is wrong with it.
pub struct RegionData {
    pub index: usize,
    pub name: String,
    /// Whether it refuses to overwrite when it is asked to create.
    honours_create: bool,
    memory: InMemory,
    state: Mutex<RegionState>,
}

pub struct RegionState {
    /// The same as in `memory`, for those who look without asking.
    pub objects: BTreeMap<String, Bytes>,
    pub faults: Faults,
    /// Requests so far.
    pub requests: u64,
    attempts: BTreeMap<u64, u64>,
}

impl RegionData {
    pub fn new(index: usize, honours_create: bool) -> Arc<RegionData> {
        let state = RegionState {
            objects: BTreeMap::new(),
            faults: Faults::NONE,
            requests: 0,
            attempts: BTreeMap::new(),
        };
        let name = format!("r{index}");
        let memory = InMemory::new();
        Arc::new(RegionData { index, name, honours_create, memory, state: Mutex::new(state) })
    }

    pub fn state(&self) -> MutexGuard<'_, RegionState> {
        self.state.lock().unwrap()
    }
}

/// What will happen to one request.
#[derive(Clone, Copy, Debug)]
struct Fate {
    before: Duration,
    after: Duration,
    refused: Option<Refusal>,
    fails_after: bool,
    hangs: bool,
    /// It is carried out even if nobody waits for it any more, or it hangs.
    lands: bool,
    says_exists: bool,
    lies: bool,
}

/// A region as one process sees it.
#[derive(Clone)]
pub struct FaultStore {
    data: Arc<RegionData>,
    fence: Arc<Fence>,
}

impl FaultStore {
    pub fn new(data: Arc<RegionData>, fence: Arc<Fence>) -> FaultStore {
        FaultStore { data, fence }
    }

    fn fate(&self, operation: &str, key: &str, bytes: u64) -> Fate {
        let mut state = self.data.state();
        state.requests += 1;
        let id = mix(&[self.fence.id, number_of(operation), number_of(key)]);
        let attempt = state.attempts.entry(id).or_default();
        *attempt += 1;
        let mut dice =
            Dice::new(mix(&[self.fence.sim.seed, self.data.index as u64, id, *attempt]), "fate");
        let faults = state.faults;
        drop(state);
        let (low, high) = faults.latency_ms;
        let slow = (bytes * 1000).checked_div(faults.rate).unwrap_or(0);
        let latency = dice.between(low, high);
        let share = dice.below(latency + 1);
        let write = operation == "put";
        Fate {
            before: Duration::from_millis(share + slow),
            after: Duration::from_millis(latency - share),
            refused: dice.percent(faults.fail_before).then_some(faults.refusal),
            fails_after: dice.percent(faults.fail_after),
            hangs: dice.percent(faults.hang),
            lands: dice.percent(50),
            says_exists: write && dice.percent(faults.says_exists),
            lies: write && dice.percent(faults.lies),
        }
    }

    fn note(&self, operation: &str, key: &str, what: &str) {
        let short = key.rsplit('/').next().unwrap_or(key);
        let fence = &self.fence;
        fence.sim.note(format!("{} {} {operation} {short}: {what}", fence.id, self.data.name));
    }

    /// A request begins or ends; the process may die of it.
    async fn step(&self) {
        self.fence.step();
        self.unless_dead().await;
    }

    /// Waits for ever once the process is dead.
    async fn unless_dead(&self) {
        if self.fence.is_dead() {
            std::future::pending::<()>().await;
        }
    }

    /// Decides a request's fate, and carries it out.
    async fn request<T, F>(
        &self,
        operation: &'static str,
        key: &str,
        bytes: u64,
        act: F,
    ) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        self.unless_dead().await;
        let fate = self.fate(operation, key, bytes);
        self.carry_out(fate, operation, key, act).await
    }

    async fn carry_out<T, F>(
        &self,
        fate: Fate,
        operation: &'static str,
        key: &str,
        act: F,
    ) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        self.step().await;
        if let Some(refusal) = fate.refused {
            tokio::time::sleep(fate.before).await;
            self.step().await;
            self.note(operation, key, "refused");
            return Err(refused(refusal, key));
        }
        if fate.hangs && !fate.lands {
            self.note(operation, key, "hangs");
            return std::future::pending().await;
        }
        let outcome = if fate.lands {
            // On its way whatever becomes of who sent it.
            let sent = async move {
                tokio::time::sleep(fate.before).await;
                act.await
            };
            tokio::spawn(sent).await.unwrap()
        } else {
            tokio::time::sleep(fate.before).await;
            self.step().await;
            act.await
        };
        self.step().await;
        if fate.hangs {
            self.note(operation, key, "hangs, and was carried out");
            return std::future::pending().await;
        }
        tokio::time::sleep(fate.after).await;
        self.step().await;
        if fate.fails_after {
            self.note(operation, key, "fails, and was carried out");
            return Err(refused(Refusal::Unavailable, key));
        }
        let what = match &outcome {
            Ok(_) => "done",
            Err(Error::NotFound { .. }) => "not found",
            Err(_) => "error",
        };
        self.note(operation, key, what);
        outcome
    }
}

fn refused(refusal: Refusal, key: &str) -> Error {
    match refusal {
        Refusal::Unavailable => Error::Generic { store: "sim", source: "503 Slow Down".into() },
        Refusal::Denied => {
            Error::PermissionDenied { path: key.to_owned(), source: "403 Forbidden".into() }
        }
    }
}

impl fmt::Debug for FaultStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for FaultStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FaultStore({})", self.data.name)
    }
}

#[async_trait]
impl ObjectStore for FaultStore {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        mut options: PutOptions,
    ) -> Result<PutResult> {
        let content = Bytes::from(payload);
        self.unless_dead().await;
        let fate = self.fate("put", location.as_ref(), content.len() as u64);
        if fate.says_exists && matches!(options.mode, PutMode::Create) {
            self.note("put", location.as_ref(), "says that it exists");
            let path = location.to_string();
            return Err(Error::AlreadyExists { path, source: "409 Conflict".into() });
        }
        if !self.data.honours_create {
            options.mode = PutMode::Overwrite;
        }
        let (store, path, body) = (self.clone(), location.clone(), content.clone());
        let act = async move {
            if fate.lies {
                store.note("put", path.as_ref(), "LIES: answers 200 and stores nothing");
                store.fence.sim.world().ledger.lied(store.data.index, path.as_ref());
                return Ok(PutResult {
                    e_tag: None,
                    version: None,
                    extensions: Default::default(),
                });
            }
            let result = store.data.memory.put_opts(&path, body.clone().into(), options).await?;
            let before = store.data.state().objects.insert(path.to_string(), body.clone());
            let by = (store.fence.is_clone(), store.data.index);
            store.fence.sim.stored(by, path.as_ref(), before.as_ref(), &body);
            Ok(result)
        };
        self.carry_out(fate, "put", location.as_ref(), act).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.data.memory.put_multipart_opts(location, options).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let (store, path) = (self.clone(), location.clone());
        let operation = if options.head { "head" } else { "get" };
        let act = async move { store.data.memory.get_opts(&path, options).await };
        self.request(operation, location.as_ref(), 0, act).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        let store = self.clone();
        locations
            .and_then(move |path| {
                let store = store.clone();
                async move {
                    let (acting, gone) = (store.clone(), path.clone());
                    let act = async move {
                        let once = futures_util::stream::once(std::future::ready(Ok(gone.clone())));
                        let deleted: Vec<_> =
                            acting.data.memory.delete_stream(once.boxed()).try_collect().await?;
                        let before = acting.data.state().objects.remove(gone.as_ref());
                        if before.is_some() {
                            acting.fence.sim.deleted(acting.data.index, gone.as_ref());
                        }
                        Ok(deleted)
                    };
                    store.request("delete", path.as_ref(), 0, act).await.map(|_| path)
                }
            })
            .boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (store, prefix) = (self.clone(), prefix.cloned());
        let listed = async move {
            let (acting, wanted) = (store.clone(), prefix.clone());
            let act = async move {
                acting.data.memory.list(wanted.as_ref()).try_collect::<Vec<ObjectMeta>>().await
            };
            let key = prefix.as_ref().map_or("", Path::as_ref);
            let found = store.request("list", key, 0, act).await?;
            Ok::<_, Error>(futures_util::stream::iter(found.into_iter().map(Ok)))
        };
        futures_util::stream::once(listed).try_flatten().boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let (store, wanted) = (self.clone(), prefix.cloned());
        let act = async move { store.data.memory.list_with_delimiter(wanted.as_ref()).await };
        self.request("folder", prefix.map_or("", Path::as_ref), 0, act).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.data.memory.copy_opts(from, to, options).await
    }
}

/// The archiver writes no parts; a backup would.
#[async_trait]
impl MultipartStore for FaultStore {
    async fn create_multipart(&self, path: &Path) -> Result<MultipartId> {
        self.data.memory.create_multipart(path).await
    }

    async fn put_part(
        &self,
        path: &Path,
        id: &MultipartId,
        part: usize,
        data: PutPayload,
    ) -> Result<PartId> {
        self.data.memory.put_part(path, id, part, data).await
    }

    async fn complete_multipart(
        &self,
        path: &Path,
        id: &MultipartId,
        parts: Vec<PartId>,
    ) -> Result<PutResult> {
        self.data.memory.complete_multipart(path, id, parts).await
    }

    async fn abort_multipart(&self, path: &Path, id: &MultipartId) -> Result<()> {
        self.data.memory.abort_multipart(path, id).await
    }
}
