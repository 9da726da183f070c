//! What every store must do when nothing goes wrong.

use bytes::Bytes;
use futures_util::future::join_all;
use futures_util::stream::{StreamExt, iter};
use pgkeep::store::{FailureKind, Put, Region};

use crate::stores::{Creation, Store};

/// More than a page of a listing, which is 1,000 on S3 and GCS and 5,000 on Azure.
const MANY: usize = 1_234;

pub fn content(length: usize, seed: u8) -> Bytes {
    (0..length).map(|n| (n as u8).wrapping_mul(31).wrapping_add((n >> 8) as u8) ^ seed).collect()
}

pub async fn run(store: &Store) {
    let region = store.region();
    let within = |name: &str| {
        println!("{}: {name}", store.name);
        region.within(name)
    };
    put_and_get(&within("put and get"), store.creation).await;
    another_length(&within("another length")).await;
    nothing(&within("zero length")).await;
    overwrite(&within("overwrite")).await;
    ranges(&within("ranges")).await;
    missing(&within("missing")).await;
    listings(&within("listings"), store).await;
    characters(&within("characters")).await;
    match store.no_parts {
        None => uploads(&within("uploads")).await,
        Some(reason) => crate::skipped(&format!("{}: uploads", store.name), reason),
    }
    concurrent_puts(&within("concurrent puts")).await;
}

/// What a second put of the same object finds.
pub fn again(creation: Creation) -> Put {
    match creation {
        Creation::Ignored => Put::Written,
        Creation::Honoured | Creation::Refused => Put::AlreadyThere,
    }
}

// I2: what is there is not written again where the store can tell.
async fn put_and_get(region: &Region, creation: Creation) {
    let before = region.requests();
    let object = content(70_000, 1);
    assert_eq!(region.put("a/b/object", object.clone()).await.unwrap(), Put::Written);
    assert_eq!(region.get("a/b/object").await.unwrap(), object);
    assert_eq!(region.size("a/b/object").await.unwrap(), Some(70_000));
    assert_eq!(region.put("a/b/object", object.clone()).await.unwrap(), again(creation));
    assert_eq!(region.put_once("a/b/object", object.clone()).await.unwrap(), again(creation));
    assert_eq!(region.get("a/b/object").await.unwrap(), object);
    assert_eq!(region.refuses_creation(), creation == Creation::Refused);
    let after = region.requests();
    assert_eq!(after.get - before.get, 2);
    assert_eq!(after.bytes_down - before.bytes_down, 2 * 70_000);
    // A store that refuses to create is asked for the size first, and not sent the object again.
    let (puts, heads) = match creation {
        Creation::Honoured => (3, 3),
        Creation::Ignored => (3, 1),
        Creation::Refused => (2, 4),
    };
    assert_eq!((after.put - before.put, after.head - before.head), (puts, heads));
    assert_eq!(after.bytes_up - before.bytes_up, puts * 70_000);
}

// I10, CASES 27: what is there may be torn; a size that is not ours is not "already there".
async fn another_length(region: &Region) {
    let object = content(50_000, 2);
    for torn in [object.slice(..20_000), content(60_000, 9), Bytes::new()] {
        region.overwrite("object", torn).await.unwrap();
        assert_eq!(region.put("object", object.clone()).await.unwrap(), Put::Written);
        assert_eq!(region.get("object").await.unwrap(), object);
    }
}

async fn nothing(region: &Region) {
    region.put("empty", Bytes::new()).await.unwrap();
    region.put("empty", Bytes::new()).await.unwrap();
    assert_eq!(region.get("empty").await.unwrap(), Bytes::new());
    assert_eq!(region.size("empty").await.unwrap(), Some(0));
    assert_eq!(region.get_tail("empty", 100).await.unwrap(), (Bytes::new(), 0));
    assert_eq!(region.list("").await.unwrap().len(), 1);
}

async fn overwrite(region: &Region) {
    for seed in [3, 4] {
        region.overwrite("alive/db1.json", content(1_000, seed)).await.unwrap();
        assert_eq!(region.get("alive/db1.json").await.unwrap(), content(1_000, seed));
    }
}

async fn ranges(region: &Region) {
    let object = content(300_000, 5);
    region.put("object", object.clone()).await.unwrap();
    for (from, to) in [(0, 1), (1_000, 200_000), (299_999, 300_000), (0, 300_000), (7, 7)] {
        let range = from as u64..to as u64;
        assert_eq!(region.get_range("object", range).await.unwrap(), object.slice(from..to));
    }
    for range in [299_000..300_001, 300_000..300_001, 400_000..500_000] {
        let error = region.get_range("object", range).await.unwrap_err();
        assert_eq!(error.kind, FailureKind::Damaged, "{error}");
    }
    let (tail, size) = region.get_tail("object", 1_000).await.unwrap();
    assert_eq!((tail, size), (object.slice(299_000..), 300_000));
    assert_eq!(region.get_tail("object", 400_000).await.unwrap(), (object, 300_000));
}

async fn missing(region: &Region) {
    let kinds = [
        region.get("no/such").await.unwrap_err().kind,
        region.get_range("no/such", 0..5).await.unwrap_err().kind,
        region.get_tail("no/such", 5).await.unwrap_err().kind,
    ];
    assert_eq!(kinds, [FailureKind::NotFound; 3]);
    assert_eq!(region.size("no/such").await.unwrap(), None);
    region.delete("no/such").await.unwrap();
    assert_eq!(region.delete_many(&["no/such".to_owned()]).await.len(), 0);
    assert_eq!(region.list("no").await.unwrap(), []);
    assert_eq!(region.list_folder("no").await.unwrap(), (vec![], vec![]));
}

// CASES 25: listing and deleting stopped at 1,000 keys.
async fn listings(region: &Region, store: &Store) {
    let name = |n: usize| match n % 2 {
        0 => format!("wal/0001/{n:06}"),
        _ => format!("wal/0002/{n:06}"),
    };
    let mut names: Vec<String> = (0..MANY).map(name).collect();
    // Below a folder whose name the others begin with, and directly in a folder.
    names.extend([
        "wal/0001x/object".to_owned(),
        "wal/object".to_owned(),
        "walx/object".to_owned(),
    ]);
    let puts = names.iter().map(|name| region.put(name, Bytes::from(name.clone())));
    iter(puts)
        .buffer_unordered(16)
        .for_each(|put| async { assert_eq!(put.unwrap(), Put::Written) })
        .await;
    let keys = |objects: Vec<pgkeep::store::ObjectInfo>| {
        assert!(objects.iter().all(|object| object.size == object.key.len() as u64));
        let mut keys: Vec<String> = objects.into_iter().map(|object| object.key).collect();
        keys.sort_unstable();
        keys
    };
    let starting = |prefix: &str| {
        let mut found: Vec<String> =
            names.iter().filter(|name| name.starts_with(prefix)).cloned().collect();
        found.sort_unstable();
        found
    };
    let before = region.requests().list;
    assert_eq!(keys(region.list("").await.unwrap()), starting(""));
    let pages = region.requests().list - before;
    match store.no_pages {
        None => assert_eq!(pages, 2, "1,237 objects, 1,000 in a page"),
        Some(reason) => {
            crate::skipped(&format!("{}: pages of listings", store.name), reason);
            assert_eq!(pages, 1);
        }
    }
    assert_eq!(keys(region.list("wal/0001").await.unwrap()), starting("wal/0001/"));
    let (folders, objects) = region.list_folder("wal").await.unwrap();
    assert_eq!(folders, ["0001", "0001x", "0002"]);
    assert_eq!(keys(objects), ["wal/object"]);
    let (folders, objects) = region.list_folder("wal/0001").await.unwrap();
    assert_eq!((folders.len(), objects.len()), (0, MANY.div_ceil(2)));
    assert_eq!(region.within("wal").list("0001x").await.unwrap()[0].key, "0001x/object");

    let before = region.requests().delete;
    let mut gone = starting("wal/");
    gone.push("wal/never/was".to_owned());
    let errors = region.delete_many(&gone).await;
    assert!(errors.is_empty(), "{errors:?}");
    assert_eq!(keys(region.list("").await.unwrap()), ["walx/object"]);
    if store.spec.url.starts_with("s3:") {
        assert_eq!(region.requests().delete - before, 2, "1,237 objects, 1,000 in a request");
    }
    region.delete("walx/object").await.unwrap();
    assert_eq!(region.list("").await.unwrap(), []);
}

async fn characters(region: &Region) {
    let names = [
        "wal/00000002/00000016/0000000200000016000000B3-00000000-01000000-792e59139804e357.zst",
        "backup/20261123T071500Z-full-9c1e/backup.json",
        "gap/00000001/00000016A0002000-00000016A2000000.json",
        "timeline/00000002-6ddbdece96558126.history",
        "alive/db1.example.com-pgkeep_2.json",
        "alive/a b+c=d&e@f,g;h!i'(j)~k%41.json",
        "alive/straße-数据.json",
    ];
    for name in names {
        region.put(name, Bytes::from(name)).await.unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(region.get(name).await.unwrap(), Bytes::from(name));
        assert_eq!(region.size(name).await.unwrap(), Some(name.len() as u64));
    }
    assert_eq!(region.list("").await.unwrap().len(), names.len());
    let keys: Vec<String> = names.map(str::to_owned).to_vec();
    let errors = region.delete_many(&keys).await;
    assert!(errors.is_empty(), "{errors:?}");
    assert_eq!(region.list("").await.unwrap(), []);
}

// I3, CASES 27: nothing is there before all of it is.
async fn uploads(region: &Region) {
    let object = content((20 << 20) + 12_345, 6);
    let mut upload = region.upload("pack").await.unwrap();
    for chunk in object.chunks(3_333_333) {
        upload.write(object.slice_ref(chunk)).await.unwrap();
    }
    assert_eq!(region.size("pack").await.unwrap(), None);
    assert_eq!(region.list("").await.unwrap(), []);
    upload.finish().await.unwrap();
    assert_eq!(region.get("pack").await.unwrap(), object);
    let tail = object.len() as u64 - 100;
    assert_eq!(region.get_tail("pack", 100).await.unwrap().0, object.slice(tail as usize..));

    let mut given_up = region.upload("given up").await.unwrap();
    given_up.write(object.slice(..10 << 20)).await.unwrap();
    given_up.abort().await;
    assert_eq!(region.size("given up").await.unwrap(), None);

    let mut small = region.upload("small").await.unwrap();
    small.write(object.slice(..1_000)).await.unwrap();
    small.finish().await.unwrap();
    assert_eq!(region.get("small").await.unwrap(), object.slice(..1_000));

    // The same again, as after a restart.
    let mut again = region.upload("pack").await.unwrap();
    again.write(object.clone()).await.unwrap();
    again.finish().await.unwrap();
    assert_eq!(region.get("pack").await.unwrap(), object);
    assert_eq!(region.list("").await.unwrap().len(), 2);
}

// Two archivers, or an uploader and a repairer, store the same piece.
async fn concurrent_puts(region: &Region) {
    let object = content(200_000, 7);
    let puts = (0..8).map(|_| region.put("object", object.clone()));
    for put in join_all(puts).await {
        put.unwrap();
    }
    assert_eq!(region.get("object").await.unwrap(), object);
}
