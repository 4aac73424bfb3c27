//! Digests of whole messages, made while their owners do something else.
//!
//! The problem: the SHA-256 of an image takes as long as to write it, and images of several associations are worth
//! more work together than one after the other (see [`crate::sha256`]). [`begin`] gives a message to a thread that
//! takes up to [`LANES`] at once, also one that comes when others are half done; [`Coming`] is its digest. There are
//! more threads only where one does not keep up, and none where nothing comes for a while. What waits is bounded: whoever
//! comes when it is too much makes the digest itself.

use std::collections::VecDeque;
use std::ops::Deref;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{Builder, available_parallelism};
use std::time::Duration;

use crate::digest::Kind;
use crate::sha256::{LANES, Progress, advance, lanes};

/// Blocks of each message until one that came meanwhile joins them.
const SLICE: usize = 1024;
/// A thread without work ends after that.
const IDLE: Duration = Duration::from_secs(1);
/// So many bytes may wait, or a single message.
const MOST_WAITING: usize = 32 << 20;
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
    /// Of their messages.
    bytes: usize,
    threads: usize,
    /// How many of them wait, and how many of these were told of a job.
    idle: usize,
    told: usize,
    /// The process that has the threads: one that was forked has none.
    process: u32,
}

impl Queue {
    const fn new(process: u32) -> Self {
        Queue {
            jobs: VecDeque::new(),
            bytes: 0,
            threads: 0,
            idle: 0,
            told: 0,
            process,
        }
    }

    fn push(&mut self, job: Job) {
        self.bytes += job.message.len();
        self.jobs.push_back(job);
    }

    /// What was pushed last is not for a thread.
    fn take_back(&mut self) {
        if let Some(job) = self.jobs.pop_back() {
            self.bytes -= job.message.len();
        }
    }

    fn pop(&mut self) -> Option<Job> {
        let job = self.jobs.pop_front()?;
        self.bytes -= job.message.len();
        Some(job)
    }
}

static QUEUE: Mutex<Queue> = Mutex::new(Queue::new(0));
static MORE: Condvar = Condvar::new();

fn queue() -> MutexGuard<'static, Queue> {
    QUEUE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Begin to make a digest. It may take as long as to make it, where too many wait.
///
/// When that of a message is there, nobody but the caller has the message. Of a [`Coming`] that is dropped no digest is
/// made.
pub fn begin<M>(kind: Kind, message: &Arc<M>) -> Coming
where
    M: Deref<Target = [u8]> + Send + Sync + 'static,
{
    if message.len() >= least(kind) {
        let coming = Coming {
            kind,
            outcome: Arc::default(),
        };
        let job = Job {
            kind,
            message: Arc::clone(message) as Message,
            progress: Progress::default(),
            outcome: Arc::clone(&coming.outcome),
        };
        if is_taken(job) {
            return coming;
        }
    }
    Coming::known(kind, kind.of(message))
}

/// Give a job to a thread; false where there is none for it.
fn is_taken(job: Job) -> bool {
    let mut queue = queue();
    if queue.process != std::process::id() {
        *queue = Queue::new(std::process::id());
    }
    let waiting = queue.bytes + job.message.len();
    if !queue.jobs.is_empty() && waiting > MOST_WAITING {
        return false;
    }
    let lanes = job.lanes();
    queue.push(job);
    // Those that work take the next ones, if they can have several.
    let idle = queue.idle - queue.told;
    if queue.threads > idle && queue.jobs.len() < lanes {
        return true;
    }
    if idle > 0 {
        queue.told += 1;
        MORE.notify_one();
    } else if queue.threads < processors() {
        if Builder::new().name("digest".into()).spawn(work).is_ok() {
            queue.threads += 1;
        } else if queue.threads == 0 {
            queue.take_back();
            return false;
        }
    }
    true
}

fn processors() -> usize {
    static COUNT: OnceLock<usize> = OnceLock::new();
    *COUNT.get_or_init(|| available_parallelism().map_or(1, usize::from))
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

    /// How many bytes it has.
    #[must_use]
    pub fn size(&self) -> usize {
        self.kind.size()
    }

    /// The digest, if it is there.
    #[must_use]
    pub fn now(&self) -> Option<Vec<u8>> {
        self.outcome.lock().clone()
    }

    /// The digest; `message` is the one that was given.
    #[must_use]
    pub fn wait(&self, message: &[u8]) -> Vec<u8> {
        let (digest, _) = self
            .outcome
            .is_there
            .wait_timeout_while(self.outcome.lock(), PATIENCE, |digest| digest.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        let found = digest.clone();
        drop(digest);
        found.unwrap_or_else(|| {
            let digest = self.kind.of(message);
            self.outcome.tell(digest.clone());
            digest
        })
    }
}

impl Outcome {
    fn lock(&self) -> MutexGuard<'_, Option<Vec<u8>>> {
        self.digest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, digest: Vec<u8>) {
        *self.lock() = Some(digest);
        self.is_there.notify_all();
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
    let room = |jobs: &Vec<Job>| jobs.first().is_none_or(|one| jobs.len() < one.lanes());
    if !room(jobs) {
        return true;
    }
    let mut queue = queue();
    while jobs.is_empty() && queue.jobs.is_empty() {
        queue.idle += 1;
        let (found, outcome) = MORE
            .wait_timeout_while(queue, IDLE, |queue| queue.told == 0)
            .unwrap_or_else(PoisonError::into_inner);
        queue = found;
        queue.idle -= 1;
        if outcome.timed_out() {
            break;
        }
        queue.told -= 1;
    }
    while room(jobs)
        && let Some(job) = queue.pop()
    {
        jobs.push(job);
    }
    if jobs.is_empty() {
        queue.threads -= 1;
    }
    !jobs.is_empty()
}

impl Job {
    /// How many such jobs a thread takes.
    fn lanes(&self) -> usize {
        match self.kind {
            Kind::Sha256 => lanes(),
            Kind::Blake3 => 1,
        }
    }

    /// Nobody waits for it any more.
    fn is_dropped(&self) -> bool {
        Arc::strong_count(&self.outcome) == 1
    }

    fn is_at_end(&self) -> bool {
        self.kind != Kind::Sha256 || self.progress.is_at_end(&self.message) || self.is_dropped()
    }

    fn end(self) {
        if self.is_dropped() {
            return;
        }
        let digest = match self.kind {
            Kind::Sha256 => self.progress.finish(&self.message).to_vec(),
            Kind::Blake3 => self.kind.of(&self.message),
        };
        // Its owner wants to use the memory again.
        drop(self.message);
        self.outcome.tell(digest);
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

    #[test]
    fn no_more_waits_than_may_and_nothing_is_made_for_nobody() {
        let message = Arc::new(vec![3; 4 << 20]);
        for _ in 0..200 {
            drop(begin(Kind::Sha256, &message));
            assert!(queue().bytes <= MOST_WAITING);
        }
        // What has to be made by now is what came last, if that.
        let coming = begin(Kind::Sha256, &message);
        assert_eq!(coming.wait(&message), Kind::Sha256.of(&message));
    }

    #[test]
    fn whoever_asks_gets_it_however_many_do() {
        let message = Arc::new(vec![5; 8 << 20]);
        let coming = begin(Kind::Sha256, &message);
        let ask = || coming.wait(&message);
        let found = std::thread::scope(|scope| {
            let threads = [scope.spawn(ask), scope.spawn(ask), scope.spawn(ask)];
            threads.map(|one| one.join().unwrap())
        });
        let wanted = Kind::Sha256.of(&message);
        assert!(found.iter().all(|one| *one == wanted));
        assert_eq!(coming.now(), Some(wanted));
    }
}
