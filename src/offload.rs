//! Work that takes a core for milliseconds: away from the threads that serve sockets.

use std::cell::Cell;
use std::time::Duration;

use tokio::task::JoinHandle;

thread_local! {
    static HERE: Cell<Option<Duration>> = const { Cell::new(None) };
}

/// From now on this thread does itself, after a random time of up to `longest`, what it would hand
/// to others: so that its clock and its random numbers alone decide what happens when.
pub fn stay_here(longest: Duration) {
    HERE.set(Some(longest));
}

/// Hands work to a thread of the runtime's pool.
pub fn offload<T, F>(work: F) -> JoinHandle<T>
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
    let Some(longest) = HERE.get() else { return tokio::task::spawn_blocking(work) };
    let pause = crate::jitter::up_to(longest);
    tokio::spawn(async move {
        tokio::time::sleep(pause).await;
        work()
    })
}
