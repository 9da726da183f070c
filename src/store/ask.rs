//! Asking all regions the same at once, without waiting for one that hangs longer than for the
//! others.

use std::future::Future;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::time::Instant;

use super::{FailureKind, Region, StoreError};

/// How long the others are waited for once one region has answered.
const GRACE: Duration = Duration::from_secs(3);
/// How long the first answer is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

/// Asks every region; the answers are in the order of the regions. Once one has answered, those
/// that say nothing for [`GRACE`] have failed.
pub async fn ask_all<T, F>(
    regions: &[Region],
    ask: impl Fn(Region) -> F,
) -> Vec<Result<T, StoreError>>
where
    F: Future<Output = Result<T, StoreError>>,
{
    let mut asked: FuturesUnordered<_> = regions
        .iter()
        .enumerate()
        .map(|(index, region)| {
            let answer = ask(region.clone());
            async move { (index, answer.await) }
        })
        .collect();
    let mut answers: Vec<Option<Result<T, StoreError>>> = regions.iter().map(|_| None).collect();
    let mut deadline = Instant::now() + PATIENCE;
    while let Ok(Some((index, answer))) = tokio::time::timeout_at(deadline, asked.next()).await {
        if answer.is_ok() {
            deadline = deadline.min(Instant::now() + GRACE);
        }
        answers[index] = Some(answer);
    }
    let silent = |region: &Region| {
        let message = "it has not answered while another region has";
        Err(region.error("ask", "", FailureKind::Transient, message))
    };
    regions
        .iter()
        .zip(answers)
        .map(|(region, answer)| answer.unwrap_or_else(|| silent(region)))
        .collect()
}
