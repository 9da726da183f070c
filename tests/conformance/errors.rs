//! Failures are sorted by what the caller can do, and say what is wrong in words for people.

use std::process::Command;
use std::time::Duration;

use bytes::Bytes;
use pgkeep::store::{FailureKind, Patience, Region, StoreError, open_region};

use crate::process::{Folder, free_port};
use crate::proxy::Silence;
use crate::stores::{self, KEY, SECRET, s3_spec, spec};

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Runtime::new().unwrap().block_on(future)
}

/// Every request that there is; each must fail.
async fn all_requests(region: &Region) -> Vec<StoreError> {
    let keys = ["a".to_owned(), "b".to_owned()];
    let mut errors = vec![
        region.put("a", Bytes::from_static(b"x")).await.unwrap_err(),
        region.overwrite("a", Bytes::from_static(b"x")).await.unwrap_err(),
        region.get("a").await.unwrap_err(),
        region.get_range("a", 0..1).await.unwrap_err(),
        region.get_tail("a", 1).await.unwrap_err(),
        region.size("a").await.unwrap_err(),
        region.list("").await.unwrap_err(),
        region.list_folder("").await.unwrap_err(),
        region.delete("a").await.unwrap_err(),
    ];
    let deletions = region.delete_many(&keys).await;
    assert_eq!(deletions.len(), 2);
    errors.extend(deletions);
    errors
}

// I9, CASES 24: uploads hung with no deadline.
#[test]
fn a_store_that_never_answers_is_an_error_within_the_deadline() {
    let silence = Silence::start();
    let patience = Patience {
        attempts: 2,
        answer: Duration::from_millis(200),
        write: Duration::from_millis(200),
        ..Patience::LOOKUP
    };
    let region = open_region(&s3_spec(silence.port, "archive", KEY, SECRET)).unwrap();
    let region = region.with_patience(patience);
    for error in block_on(all_requests(&region)) {
        assert_eq!(error.kind, FailureKind::Transient, "{error}");
        assert!(error.message.contains("no answer within 0.2 s"), "{error}");
    }
    // Every attempt is counted, and there are two.
    assert_eq!(region.requests().head, 2);
    assert_eq!(region.requests().get, 6);
}

#[test]
fn a_store_that_is_not_there_is_told() {
    let region = open_region(&s3_spec(free_port(), "archive", KEY, SECRET)).unwrap();
    for error in block_on(all_requests(&region.with_patience(Patience::LOOKUP))) {
        assert_eq!(error.kind, FailureKind::Transient, "{error}");
        assert!(error.message.contains("nothing listens there"), "{error}");
    }
    let options = [
        ("endpoint", "http://no-such-host.invalid:80".to_owned()),
        ("access_key_id", KEY.to_owned()),
        ("secret_access_key", SECRET.to_owned()),
    ];
    let region = open_region(&spec("s3://archive", &options)).unwrap();
    let error = block_on(region.with_patience(Patience::LOOKUP).get("a")).unwrap_err();
    assert_eq!(error.kind, FailureKind::Transient, "{error}");
    assert!(error.message.contains("name cannot be resolved"), "{error}");
}

#[test]
fn wrong_credentials_and_a_missing_bucket_are_told_and_not_taken_for_an_empty_archive() {
    let store = stores::seaweedfs();
    let port = store.proxy.as_ref().unwrap().port;
    let region = open_region(&s3_spec(port, "archive", KEY, "wrong")).unwrap();
    let error = block_on(region.list("")).unwrap_err();
    assert_eq!(error.kind, FailureKind::Denied, "{error}");
    assert!(error.message.contains("SignatureDoesNotMatch"), "{error}");
    let region = open_region(&s3_spec(port, "nowhere", KEY, SECRET)).unwrap();
    block_on(async {
        let put = region.put("a", Bytes::from_static(b"x")).await.unwrap_err();
        for error in [put, region.get("a").await.unwrap_err(), region.list("").await.unwrap_err()] {
            assert_eq!(error.kind, FailureKind::Permanent, "{error}");
            assert!(error.message.contains("the bucket or container does not exist"), "{error}");
        }
    });
    // One attempt each: it does not pass.
    assert_eq!(region.requests().get, 1);
}

#[test]
fn a_folder_that_is_missing_fails_every_request_until_it_is_there() {
    let folder = Folder::new();
    let path = folder.path().join("disk/archive");
    let region = open_region(&spec(&format!("file://{}", path.display()), &[])).unwrap();
    for error in block_on(all_requests(&region)) {
        assert_eq!(error.kind, FailureKind::Transient, "{error}");
        assert!(error.message.contains("does not exist; is its disk mounted?"), "{error}");
    }
    assert!(!folder.path().join("disk").exists());
    std::fs::create_dir_all(&path).unwrap();
    block_on(region.put("wal/a", Bytes::from_static(b"x"))).unwrap();
    std::fs::rename(folder.path().join("disk"), folder.path().join("away")).unwrap();
    for error in block_on(all_requests(&region)) {
        assert_eq!(error.kind, FailureKind::Transient, "{error}");
        assert!(error.message.contains("is gone; is its disk mounted?"), "{error}");
    }
    assert!(!folder.path().join("disk").exists());
    std::fs::rename(folder.path().join("away"), folder.path().join("disk")).unwrap();
    assert_eq!(block_on(region.get("wal/a")).unwrap(), Bytes::from_static(b"x"));
}

/// A small file system, unmounted in the end.
struct SmallDisk<'a>(&'a std::path::Path);

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0).status();
    }
}

#[test]
fn a_full_disk_is_told_and_leaves_nothing_torn() {
    let folder = Folder::new();
    let path = folder.make("small");
    let mount =
        Command::new("mount").args(["-t", "tmpfs", "-o", "size=256k", "tmpfs"]).arg(&path).output();
    if !mount.is_ok_and(|mount| mount.status.success()) {
        return crate::skipped("a full disk", "this user cannot mount a small tmpfs");
    }
    let disk = SmallDisk(&path);
    let region = open_region(&spec(&format!("file://{}", path.display()), &[])).unwrap();
    let region = region.with_patience(Patience::LOOKUP);
    block_on(async {
        region.put("a", Bytes::from(vec![1; 1_000])).await.unwrap();
        let error = region.put("b", Bytes::from(vec![2; 1 << 20])).await.unwrap_err();
        assert_eq!(error.kind, FailureKind::Transient, "{error}");
        assert!(error.message.contains("the disk is full"), "{error}");
        assert_eq!(region.size("b").await.unwrap(), None);
        assert_eq!(region.list("").await.unwrap().len(), 1);
        // There is room again for what fits.
        region.put("c", Bytes::from(vec![3; 1_000])).await.unwrap();
    });
    drop(disk);
}
