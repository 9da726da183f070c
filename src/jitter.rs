//! Pauses that differ: many clients that failed together must not come back together.

use std::cell::RefCell;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

thread_local! {
    static RANDOM: RefCell<StdRng> = RefCell::new(rand::make_rng());
}

/// Makes what follows on this thread repeatable.
pub fn seed(seed: u64) {
    RANDOM.with_borrow_mut(|random| *random = StdRng::seed_from_u64(seed));
}

/// A pause of three quarters to five quarters of this one.
pub fn around(pause: Duration) -> Duration {
    RANDOM.with_borrow_mut(|random| pause.mul_f64(random.random_range(0.75..1.25)))
}

/// A pause of up to this one.
pub fn up_to(longest: Duration) -> Duration {
    RANDOM.with_borrow_mut(|random| longest.mul_f64(random.random_range(0.0..1.0)))
}
