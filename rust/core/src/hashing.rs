//! Digests of whole messages, made while their owners do something else.
//!
//! The problem: the SHA-256 of an image takes as long as to write it, and images of several associations are worth
//! more work together than one after the other (see [`crate::sha256`]). [`begin`] gives a message to a thread that
//! takes up to [`LANES`] at once, also one that comes when others are half done; [`Coming`] is its digest. There are
//! more threads only where one does not keep up, and none where nothing comes for a while.

use std::collections::VecDeque;
use std::ops::Deref;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, available_parallelism};
use std::time::Duration;

use crate::digest::Kind;
use crate::sha256::{LANES, Progress, advance};

/// Blocks of each message until one that came meanwhile joins them.
const SLICE: usize = 1024;
/// A thread without work ends after that.
const IDLE: Duration = Duration::from_secs(1);
/// Whoever has waited that long makes the digest itself, whatever became of the thread.
const PATIENCE: Duration = Duration::from_secs(10);

type Message = Arc<dyn Deref<Target = [u8]> + Send + Sync>;

/// A smaller message is hashed sooner than a thread is told of it.
fn least(kind: Kind) -> usize {
    match kind {
        Kind::Sha256 => 64 << 10,
        Kind::Blake3 => 256 << 10,
    }
}

/// A digest that is there, or will be in a moment.
pub struct Coming {
    kind: Kind,
    outcome: Arc<Outcome>,
}

#[derive(Default)]
struct Outcome {
    digest: Mutex<Option<Vec<u8>>>,
    is_there: Condvar,
}

struct Job {
    kind: Kind,
    message: Message,
    progress: Progress,
    outcome: Arc<Outcome>,
}

struct Queue {
    jobs: VecDeque<Job>,
    threads: usize,
    /// Whether one of them waits for a job.
    is_awaited: bool,
    /// The process that has the threads: one that was forked has none.
    process: u32,
}

static QUEUE: Mutex<Queue> = Mutex::new(Queue {
    jobs: VecDeque::new(),
    threads: 0,
    is_awaited: false,
    process: 0,
});
static MORE: Condvar = Condvar::new();

fn queue() -> MutexGuard<'static, Queue> {
    QUEUE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Begin to make a digest.
///
/// When that of a message is there, nobody but the caller has the message.
pub fn begin<M>(kind: Kind, message: &Arc<M>) -> Coming
where
    M: Deref<Target = [u8]> + Send + Sync + 'static,
{
    if message.len() < least(kind) {
        return Coming::known(kind, kind.of(message));
    }
    let outcome = Arc::<Outcome>::default();
    let mut queue = queue();
    if queue.process != std::process::id() {
        *queue = Queue {
            jobs: VecDeque::new(),
            threads: 0,
            is_awaited: false,
            process: std::process::id(),
        };
    }
    queue.jobs.push_back(Job {
        kind,
        message: Arc::clone(message) as Message,
        progress: Progress::default(),
        outcome: Arc::clone(&outcome),
    });
    if queue.is_awaited {
        MORE.notify_one();
    } else if queue.threads == 0 || (queue.jobs.len() > LANES && queue.threads < processors()) {
        if Builder::new().name("digest".into()).spawn(work).is_ok() {
            queue.threads += 1;
        } else if queue.threads == 0 {
            queue.jobs.pop_back();
            return Coming::known(kind, kind.of(message));
        }
    }
    Coming { kind, outcome }
}

fn processors() -> usize {
    available_parallelism().map_or(1, usize::from)
}

impl Coming {
    /// One that is there.
    #[must_use]
    pub fn known(kind: Kind, digest: Vec<u8>) -> Self {
        let outcome = Outcome {
            digest: Mutex::new(Some(digest)),
            is_there: Condvar::new(),
        };
        Coming {
            kind,
            outcome: Arc::new(outcome),
        }
    }

    /// The digest, if it is there.
    #[must_use]
    pub fn now(&self) -> Option<Vec<u8>> {
        self.outcome.lock().clone()
    }

    /// The digest; `message` is the one that was given.
    #[must_use]
    pub fn wait(&self, message: &[u8]) -> Vec<u8> {
        let (mut digest, _) = self
            .outcome
            .is_there
            .wait_timeout_while(self.outcome.lock(), PATIENCE, |digest| digest.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        digest.get_or_insert_with(|| self.kind.of(message)).clone()
    }
}

impl Outcome {
    fn lock(&self) -> MutexGuard<'_, Option<Vec<u8>>> {
        self.digest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A thread, counted until it ends, also in a way that nobody foresaw.
struct Counted;

impl Drop for Counted {
    fn drop(&mut self) {
        queue().threads -= 1;
    }
}

fn work() {
    let counted = Counted;
    let mut jobs = Vec::with_capacity(LANES);
    while fill(&mut jobs) {
        jobs.extract_if(.., |job| job.is_at_end())
            .for_each(Job::end);
        let mut messages: Vec<_> = jobs
            .iter_mut()
            .map(|job| (&mut job.progress, &**job.message))
            .collect();
        advance(&mut messages, SLICE);
    }
    std::mem::forget(counted);
}

/// Take the jobs that wait, as far as there are lanes for them; where there is none at all, wait for one. False
/// where none came: then this thread is not counted any more.
fn fill(jobs: &mut Vec<Job>) -> bool {
    if jobs.len() == LANES {
        return true;
    }
    let mut queue = queue();
    if jobs.is_empty() && queue.jobs.is_empty() && !queue.is_awaited {
        queue.is_awaited = true;
        queue = MORE
            .wait_timeout_while(queue, IDLE, |queue| queue.jobs.is_empty())
            .unwrap_or_else(PoisonError::into_inner)
            .0;
        queue.is_awaited = false;
    }
    while jobs.len() < LANES
        && let Some(job) = queue.jobs.pop_front()
    {
        jobs.push(job);
    }
    if jobs.is_empty() {
        queue.threads -= 1;
    }
    !jobs.is_empty()
}

impl Job {
    fn is_at_end(&self) -> bool {
        self.kind != Kind::Sha256 || self.progress.is_at_end(&self.message)
    }

    fn end(self) {
        let digest = match self.kind {
            Kind::Sha256 => self.progress.finish(&self.message).to_vec(),
            Kind::Blake3 => self.kind.of(&self.message),
        };
        // Its owner wants to use the memory again.
        drop(self.message);
        *self.outcome.lock() = Some(digest);
        self.outcome.is_there.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_that_are_made_together_are_those_that_each_has_alone() {
        let messages: Vec<_> = (0..40_usize)
            .map(|k| {
                let byte = |at: usize| ((at * 13 + at / 255 + k) % 256) as u8;
                Arc::new((0..k * k * 300 + k).map(byte).collect::<Vec<u8>>())
            })
            .collect();
        for kind in [Kind::Sha256, Kind::Blake3] {
            let coming: Vec<_> = messages.iter().map(|one| begin(kind, one)).collect();
            for (one, coming) in messages.iter().zip(coming) {
                assert_eq!(coming.wait(one), kind.of(one));
            }
        }
        assert!(messages.iter().all(|one| Arc::strong_count(one) == 1));
    }

    #[test]
    fn one_after_the_other_is_right_too() {
        for length in [0, 1, 100_000, 64, 200_001] {
            let message = Arc::new(vec![7; length]);
            let found = begin(Kind::Sha256, &message).wait(&message);
            assert_eq!(found, Kind::Sha256.of(&message));
        }
    }
}
