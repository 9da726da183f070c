//! One region: whether it takes, gives, lists and deletes what it should.

use std::time::Duration;

use bytes::Bytes;

use super::Items;
use crate::config::{Config, RegionConfig};
use crate::store::{Patience, Put, Region, RegionSpec, open_region};

/// How long a region may take for everything that is tried.
const REGION_DEADLINE: Duration = Duration::from_secs(60);

/// Checks one region.
pub(super) async fn check(config: &Config, region: &RegionConfig) -> Items {
    let mut items = Items::default();
    let item = format!("region {}", region.name);
    let checked = check_in_time(config, region, &mut items);
    if tokio::time::timeout(REGION_DEADLINE, checked).await.is_err() {
        items.fail(
            &item,
            format!("{}: no answer within {} s", region.url, REGION_DEADLINE.as_secs()),
            Some("is the store reachable from here, and is the endpoint right?".into()),
        );
    }
    items
}

async fn check_in_time(config: &Config, region: &RegionConfig, items: &mut Items) {
    let item = format!("region {}", region.name);
    let spec = RegionSpec {
        name: region.name.clone(),
        url: region.url.clone(),
        options: region.option_texts(),
    };
    let opened = match open_region(&spec) {
        Ok(opened) => opened.within(&config.cluster.name),
        Err(error) => return items.fail(&item, error.message, None),
    };
    match try_region(&opened.with_patience(Patience::LOOKUP)).await {
        Ok(conditional) => {
            let create = match conditional {
                _ if opened.refuses_creation() => "refuses",
                true => "honours",
                false => "ignores",
            };
            items.ok(&item, format!("{}: write, read, list and delete work; it {create} conditional creation", region.url));
        }
        // What a local folder lacks is in its message.
        Err(error) if region.url.starts_with("file:") => items.fail(&item, error.to_string(), None),
        Err(error) => items.fail(
            &item,
            error.to_string(),
            Some("check the URL, the credentials (the provider's usual environment variables, or keys of this [[region]]), and that they allow to write, read, list and delete".into()),
        ),
    }
}

/// Writes, reads, lists and deletes one small object. Gives whether the store honours conditional
/// creation, on which nothing depends.
async fn try_region(region: &Region) -> Result<bool, crate::store::StoreError> {
    let key = format!("check/{:016x}", rand::random::<u64>());
    let content = Bytes::from_static(b"pgkeep check: this object may be deleted\n");
    region.put(&key, content.clone()).await?;
    let outcome = async {
        let read = region.get(&key).await?;
        if read != content {
            return Err(region.damaged(&key, "what was read is not what was written"));
        }
        let listed = region.list("check").await?;
        if !listed.iter().any(|object| object.key == key) {
            return Err(region.damaged(&key, "what was written is not listed"));
        }
        Ok(region.put_once(&key, content.clone()).await? == Put::AlreadyThere)
    };
    let outcome = outcome.await;
    region.delete(&key).await?;
    outcome
}
