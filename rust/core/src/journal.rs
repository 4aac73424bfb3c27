//! One file of the journal: what images were answered for.
//!
//! The problem: a disk takes as long to flush ten small files as ten times one, and as long as one to flush ten records in
//! one file. [`JournalFile`] puts what several threads bring at the same time behind one another, and one of them writes and
//! flushes for all. [`JournalFile::record`] tells what a record is.

use std::collections::TryReserveError;
use std::io;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;

use rustix::fs::{fdatasync, unlink};
use rustix::io::{Errno, pread, pwrite};

use crate::digest::Kind;
use crate::incoming::{Flush, link};

/// Each record begins at a multiple of it, so that one behind a damaged one is found.
pub const BLOCK: usize = 512;
/// Bytes that tell the records of this file from whatever was in it before.
pub const NONCE: usize = 16;
/// Bytes of a digest.
const CHECK: usize = 16;

/// Tells whoever waits for it that a record is kept.
pub type Answer = Box<dyn FnOnce() + Send>;

/// An open file, from one place on.
pub struct JournalFile(Arc<Shared>);

/// What those who bring records have together with the thread that writes for them.
struct Shared {
    file: OwnedFd,
    nonce: [u8; NONCE],
    size: u64,
    is_flushed: bool,
    state: Mutex<State>,
    /// For those whose records the same write takes: of every other write the same.
    written: [Condvar; 2],
    /// For who waits in `finish`.
    idle: Condvar,
    /// For the thread that goes on with what waits.
    more: Condvar,
}

/// The name that an open file of `size` bytes is to have in a folder; see [`link`].
pub struct Naming<'a> {
    pub opened: BorrowedFd<'a>,
    pub size: u64,
    pub folder: &'a Path,
    pub name: &'a str,
    pub flush: Flush,
}

impl Naming<'_> {
    fn give(&self) -> io::Result<bool> {
        link(self.opened, self.size, self.folder, self.name, self.flush)
    }

    fn take_back(&self) {
        let _ = unlink(self.folder.join(self.name));
    }
}

/// What became of an image; see [`JournalFile::keep`].
#[derive(Debug, PartialEq, Eq)]
pub enum Kept {
    /// It has its name and its record.
    Whole,
    /// Nothing was done.
    NameTaken,
    /// The record does not fit: nothing was done.
    Full,
}

struct State {
    /// Where the next record goes that nobody writes yet.
    end: u64,
    /// Records that nobody writes yet, and those who are to be told of them.
    waiting: Vec<u8>,
    answers: Vec<Answer>,
    /// Bytes of records that will come.
    promised: u64,
    /// How many there were in all, how many of these are kept, and how many settled.
    count: u64,
    kept: u64,
    settled: u64,
    is_writing: bool,
    /// How many have begun.
    writes: usize,
    /// How many threads wait at each of `written`: to wake nobody is a call of the system too.
    sleeping: [usize; 2],
    is_finished: bool,
    failed: Option<Errno>,
    has_thread: bool,
    /// Whether that has to end.
    is_over: bool,
}

impl JournalFile {
    /// Records go to `file` from `start` on, as long as they end before `size`. Unless it `is_flushed` they survive a killed
    /// process, not a power cut.
    #[must_use]
    pub fn new(file: OwnedFd, nonce: [u8; NONCE], start: u64, size: u64, is_flushed: bool) -> Self {
        JournalFile(Arc::new(Shared {
            file,
            nonce,
            size,
            is_flushed,
            state: Mutex::new(State {
                end: start,
                waiting: Vec::new(),
                answers: Vec::new(),
                promised: 0,
                count: 0,
                kept: 0,
                settled: 0,
                is_writing: false,
                writes: 0,
                sleeping: [0, 0],
                is_finished: false,
                failed: None,
                has_thread: false,
                is_over: false,
            }),
            written: [Condvar::new(), Condvar::new()],
            idle: Condvar::new(),
            more: Condvar::new(),
        }))
    }

    /// Keep a record; false, and nothing is done, where it does not fit. Whoever does has to call `settle` in the end.
    ///
    /// # Errors
    /// Where that fails, and from then on.
    pub fn append(&self, record: &[u8]) -> io::Result<bool> {
        let state = self.0.lock();
        if !self.0.has_room(&state, record.len() as u64)? {
            return Ok(false);
        }
        self.0.add(state, record, None, || ()).map(|()| true)
    }

    /// Give a file its name, keep the record of `length` bytes that is made after it, and then `answer`. This goes on with
    /// `meanwhile` as soon as there is nothing for it to do; where that has ended, it is kept or has failed. Where it was kept,
    /// `settle` has to be called in the end.
    ///
    /// # Errors
    /// Where that fails; it has no name then, and there is no answer.
    pub fn keep(
        &self,
        length: usize,
        naming: &Naming<'_>,
        make: impl FnOnce() -> io::Result<Vec<u8>>,
        answer: Option<Answer>,
        meanwhile: impl FnOnce(),
    ) -> io::Result<Kept> {
        let (shared, length) = (&self.0, length as u64);
        let mut state = shared.lock();
        if !shared.has_room(&state, length)? {
            return Ok(Kept::Full);
        }
        // A file that has lost its name cannot get another one: its record has to have room before that.
        state.promised += length;
        drop(state);
        let made = match naming.give() {
            Ok(true) => make().map(Some).inspect_err(|_| naming.take_back()),
            Ok(false) => Ok(None),
            Err(error) => Err(error),
        };
        let mut state = shared.lock();
        state.promised -= length;
        match made {
            Ok(Some(record)) => shared
                .add(state, &record, answer, meanwhile)
                .map(|()| Kept::Whole)
                .inspect_err(|_| naming.take_back()),
            Ok(None) => {
                shared.tell(&state);
                Ok(Kept::NameTaken)
            }
            Err(error) => {
                shared.tell(&state);
                Err(error)
            }
        }
    }

    /// Whether records survive a power cut.
    #[must_use]
    pub fn is_flushed(&self) -> bool {
        self.0.is_flushed
    }

    /// Whether a write or a flush has failed, so that no record is kept any more.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.0.lock().failed.is_some()
    }

    /// What has to happen after a record was kept, and before its file is let go, has happened.
    pub fn settle(&self) {
        let mut state = self.0.lock();
        state.settled += 1;
        self.0.tell(&state);
    }

    /// Let nothing more fit, and wait until all that did has settled or has failed.
    pub fn finish(&self) {
        let mut state = self.0.lock();
        state.is_finished = true;
        // After a failure no other than those that were kept settle.
        let all = |state: &State| state.failed.map_or(state.count, |_| state.kept);
        while state.is_writing || state.promised > 0 || state.settled < all(&state) {
            let turned = self.0.idle.wait(state);
            state = turned.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// How long a record of so many bytes of text and of the image is.
    ///
    /// # Errors
    /// Where they are too many.
    pub fn length(text: usize, image: usize) -> io::Result<usize> {
        (NONCE + CHECK + 8 + text)
            .checked_add(image)
            .and_then(|sum| sum.checked_next_multiple_of(BLOCK))
            .ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }

    /// A record, whole blocks: the number of the file, a digest of all that follows, how many bytes the text and the image
    /// have, both of them, zeros.
    ///
    /// # Errors
    /// Where the image cannot be read, or is shorter.
    pub fn record(
        &self,
        text: &[u8],
        image: Option<(BorrowedFd<'_>, usize)>,
    ) -> io::Result<Vec<u8>> {
        let too_long = |_| io::Error::other("too long for a record");
        let size = image.map_or(0, |(_, size)| size);
        let sizes = [text.len(), size].map(|one| u32::try_from(one).map_err(too_long));
        let [texts, images] = sizes;
        let start = NONCE + CHECK + 8 + text.len();
        let length = Self::length(text.len(), size)?;
        let mut record = Vec::new();
        let no_memory = |_: TryReserveError| io::Error::from(io::ErrorKind::OutOfMemory);
        record.try_reserve_exact(length).map_err(no_memory)?;
        record.extend_from_slice(&self.0.nonce);
        record.extend_from_slice(&[0; CHECK]);
        record.extend_from_slice(&texts?.to_le_bytes());
        record.extend_from_slice(&images?.to_le_bytes());
        record.extend_from_slice(text);
        record.resize(length, 0);
        if let Some((image, size)) = image {
            read_all(image, &mut record[start..start + size])?;
        }
        let check = Kind::Blake3.of(&record[NONCE + CHECK..start + size]);
        record[NONCE..NONCE + CHECK].copy_from_slice(&check);
        Ok(record)
    }
}

impl Drop for JournalFile {
    fn drop(&mut self) {
        self.0.lock().is_over = true;
        self.0.more.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_room(&self, state: &State, length: u64) -> io::Result<bool> {
        if let Some(error) = state.failed {
            return Err(error.into());
        }
        let end = state.end + state.waiting.len() as u64 + state.promised + length;
        Ok(!state.is_finished && end <= self.size)
    }

    /// Let who waits in `finish` look again.
    fn tell(&self, state: &State) {
        if state.is_finished {
            self.idle.notify_all();
        }
    }

    /// Keep a record that fits.
    fn add<'a>(
        self: &'a Arc<Self>,
        mut state: MutexGuard<'a, State>,
        record: &[u8],
        answer: Option<Answer>,
        meanwhile: impl FnOnce(),
    ) -> io::Result<()> {
        if let Some(error) = state.failed {
            self.tell(&state);
            return Err(error.into());
        }
        state.waiting.extend_from_slice(record);
        state.answers.extend(answer);
        state.count += 1;
        let (mine, write) = (state.count, state.writes + 1);
        let mut meanwhile = Some(meanwhile);
        if state.is_writing {
            drop(state);
            if let Some(work) = meanwhile.take() {
                work();
            }
            state = self.lock();
        }
        while state.kept < mine {
            if let Some(error) = state.failed {
                return Err(error.into());
            }
            state = if state.is_writing {
                state.sleeping[write % 2] += 1;
                let turned = self.written[write % 2].wait(state);
                let mut state = turned.unwrap_or_else(PoisonError::into_inner);
                state.sleeping[write % 2] -= 1;
                state
            } else {
                self.write(state)
            };
        }
        drop(state);
        if let Some(work) = meanwhile {
            work();
        }
        Ok(())
    }

    /// Write and flush what waits by now, and tell of it.
    fn write<'a>(self: &'a Arc<Self>, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let bytes = mem::take(&mut state.waiting);
        let answers = mem::take(&mut state.answers);
        let (place, last) = (state.end, state.count);
        state.end += bytes.len() as u64;
        state.is_writing = true;
        state.writes += 1;
        let write = state.writes;
        drop(state);
        let outcome = write_all(self.file.as_fd(), &bytes, place).and_then(|()| {
            // An error of what is flushed here shows nowhere else.
            if self.is_flushed {
                fdatasync(&self.file)
            } else {
                Ok(())
            }
        });
        let mut state = self.lock();
        state.is_writing = false;
        let is_kept = outcome.is_ok();
        match outcome {
            Ok(()) => state.kept = last,
            Err(error) => state.failed = Some(error),
        }
        if state.waiting.is_empty() {
            let mut bytes = bytes;
            bytes.clear();
            state.waiting = bytes;
        }
        if state.sleeping[write % 2] > 0 {
            self.written[write % 2].notify_all();
        }
        let next = &self.written[(write + 1) % 2];
        let mut untold = Vec::new();
        if state.failed.is_some() {
            next.notify_all();
            state.waiting = Vec::new();
            untold = mem::take(&mut state.answers);
        } else if !state.waiting.is_empty() && !self.go_on(&mut state) {
            // Of those who came meanwhile one writes for all.
            next.notify_one();
        }
        self.tell(&state);
        if !(answers.is_empty() && untold.is_empty()) {
            drop(state);
            // What they hold may take its time to go.
            drop(untold);
            if is_kept {
                answers.into_iter().for_each(|answer| answer());
            }
            state = self.lock();
        }
        state
    }

    /// Let a thread go on with what waits; false where there is none.
    fn go_on(self: &Arc<Self>, state: &mut State) -> bool {
        if !state.has_thread {
            let shared = Arc::clone(self);
            let thread = Builder::new().name("journal".into());
            state.has_thread = thread.spawn(move || shared.run()).is_ok();
        }
        self.more.notify_one();
        state.has_thread
    }

    /// Write what waits and nobody writes, until nothing can come any more.
    fn run(self: &Arc<Self>) {
        let mut state = self.lock();
        while !state.is_over {
            state = if state.waiting.is_empty() || state.is_writing || state.failed.is_some() {
                let turned = self.more.wait(state);
                turned.unwrap_or_else(PoisonError::into_inner)
            } else {
                self.write(state)
            };
        }
    }
}

fn write_all(file: BorrowedFd<'_>, mut bytes: &[u8], mut place: u64) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match pwrite(file, bytes, place) {
            Ok(0) => return Err(Errno::IO),
            Ok(count) => {
                bytes = &bytes[count..];
                place += count as u64;
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn read_all(file: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<()> {
    let mut read = 0;
    while read < bytes.len() {
        match pread(file, &mut bytes[read..], read as u64) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => read += count,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};
    use std::os::fd::AsFd;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    use crate::testing::TemporaryFile;

    fn journal(path: &std::path::Path, size: u64) -> JournalFile {
        let file = File::options().read(true).write(true).open(path).unwrap();
        JournalFile::new(file.into(), [7; NONCE], BLOCK as u64, size, true)
    }

    #[test]
    fn what_several_bring_at_once_is_there_and_each_is_whole() {
        let file = TemporaryFile::new(b"");
        let image = TemporaryFile::new(&[9; 1000]);
        let opened = File::open(image.path()).unwrap();
        let journal = journal(file.path(), 1 << 20);
        thread::scope(|scope| {
            for case in 0..8_u64 {
                let (journal, opened) = (&journal, &opened);
                scope.spawn(move || {
                    for _ in 0..5 {
                        let image = Some((opened.as_fd(), 1000));
                        let record = journal.record(&case.to_le_bytes(), image).unwrap();
                        assert!(journal.append(&record).unwrap());
                        journal.settle();
                    }
                });
            }
        });
        let found = fs::read(file.path()).unwrap();
        assert_eq!(found.len(), BLOCK + 40 * 3 * BLOCK);
        let mut cases = [0; 8];
        for record in found[BLOCK..].chunks(3 * BLOCK) {
            assert_eq!(record[..NONCE], [7; NONCE]);
            let end = NONCE + CHECK + 8 + 8 + 1000;
            assert_eq!(
                record[NONCE..NONCE + CHECK],
                Kind::Blake3.of(&record[NONCE + CHECK..end])
            );
            assert_eq!(record[32..40], [8, 0, 0, 0, 232, 3, 0, 0]);
            assert_eq!(record[48..end], [9; 1000]);
            assert!(record[end..].iter().all(|one| *one == 0));
            cases[usize::from(record[40])] += 1;
        }
        assert_eq!(cases, [5; 8]);
    }

    #[test]
    fn who_brings_a_record_while_another_is_written_goes_on_and_is_told() {
        let file = TemporaryFile::new(b"");
        let folder = file.path().with_extension("folder");
        fs::create_dir(&folder).unwrap();
        let journal = journal(file.path(), 1 << 20);
        let (told, early) = (Arc::new(AtomicUsize::new(0)), AtomicUsize::new(0));
        thread::scope(|scope| {
            for thread in 0..8 {
                let (journal, folder, told, early) = (&journal, &folder, &told, &early);
                scope.spawn(move || {
                    for number in 0..50 {
                        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::TMPFILE;
                        let mode = rustix::fs::Mode::RWXU;
                        let opened = rustix::fs::open(folder, flags, mode).unwrap();
                        let name = format!("{thread}-{number}");
                        let naming = Naming {
                            opened: opened.as_fd(),
                            size: 0,
                            folder,
                            name: &name,
                            flush: Flush::Nothing,
                        };
                        let mine = Arc::new(AtomicUsize::new(0));
                        let (all, one) = (Arc::clone(told), Arc::clone(&mine));
                        let answer: Answer = Box::new(move || {
                            one.fetch_add(1, Ordering::Relaxed);
                            all.fetch_add(1, Ordering::Relaxed);
                        });
                        let meanwhile = || {
                            let is_early = mine.load(Ordering::Relaxed) == 0;
                            early.fetch_add(usize::from(is_early), Ordering::Relaxed);
                        };
                        let make = || Ok(vec![1; BLOCK]);
                        let kept = journal.keep(BLOCK, &naming, make, Some(answer), meanwhile);
                        assert_eq!(kept.unwrap(), Kept::Whole);
                        journal.settle();
                    }
                });
            }
        });
        journal.finish();
        // Whoever writes tells of what it wrote when that is kept.
        while told.load(Ordering::Relaxed) < 400 {
            thread::yield_now();
        }
        assert!(early.load(Ordering::Relaxed) > 0);
        assert_eq!(fs::read(file.path()).unwrap()[BLOCK..], [1; 400 * BLOCK]);
        fs::remove_dir_all(&folder).unwrap();
        let shared = Arc::downgrade(&journal.0);
        drop(journal);
        while shared.upgrade().is_some() {
            thread::yield_now();
        }
    }

    #[test]
    fn a_record_has_room_before_its_image_has_a_name() {
        let file = TemporaryFile::new(b"");
        let folder = file.path().with_extension("folder");
        fs::create_dir(&folder).unwrap();
        let unnamed = || {
            let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::TMPFILE;
            rustix::fs::open(&folder, flags, rustix::fs::Mode::RWXU).unwrap()
        };
        let keep = |journal: &JournalFile, record: &[u8], opened: OwnedFd, size, name: &str| {
            let naming = Naming {
                opened: opened.as_fd(),
                size,
                folder: &folder,
                name,
                flush: Flush::Nothing,
            };
            journal.keep(record.len(), &naming, || Ok(record.to_vec()), None, || ())
        };
        let journal = journal(file.path(), 9 * BLOCK as u64);
        let record = [1; BLOCK];
        let kept = keep(&journal, &record, unnamed(), 0, "0");
        assert_eq!(kept.unwrap(), Kept::Whole);
        journal.settle();
        let unfitting = [1; 8 * BLOCK];
        for (record, name, size, wanted) in [
            (&record[..], "0", 0, Ok(Kept::NameTaken)),
            (&unfitting[..], "9", 0, Ok(Kept::Full)),
            (&record[..], "9", 7, Err(())),
        ] {
            let kept = keep(&journal, record, unnamed(), size, name);
            assert_eq!(kept.map_err(|_| ()), wanted);
        }
        let count = thread::scope(|scope| {
            let threads: Vec<_> = (1..=8)
                .map(|number| {
                    let (journal, folder, opened) = (&journal, &folder, unnamed());
                    let keep = &keep;
                    scope.spawn(move || {
                        let name = number.to_string();
                        let kept = keep(journal, &[2; BLOCK], opened, 0, &name);
                        let is_kept = kept.unwrap() == Kept::Whole;
                        assert_eq!(folder.join(name).exists(), is_kept);
                        if is_kept {
                            journal.settle();
                        }
                        is_kept
                    })
                })
                .collect();
            let kept = threads.into_iter().map(|one| one.join().unwrap());
            kept.filter(|one| *one).count()
        });
        assert_eq!(count, 7);
        journal.finish();
        let promising = self::journal(file.path(), 3 * BLOCK as u64);
        promising.0.lock().promised = BLOCK as u64;
        assert!(!promising.append(&[1; 2 * BLOCK]).unwrap());
        assert!(promising.append(&[1; BLOCK]).unwrap());
        let kept = keep(&journal, &record, unnamed(), 0, "9");
        assert_eq!(kept.unwrap(), Kept::Full);
        let unwritable = File::open(file.path()).unwrap();
        let broken = JournalFile::new(unwritable.into(), [7; NONCE], 0, 1 << 20, true);
        for _ in 0..2 {
            let kept = keep(&broken, &record, unnamed(), 0, "9");
            assert!(kept.is_err() && broken.has_failed() && !folder.join("9").exists());
        }
        broken.finish();
        let (unmade, opened) = (self::journal(file.path(), 1 << 20), unnamed());
        let naming = Naming {
            opened: opened.as_fd(),
            size: 0,
            folder: &folder,
            name: "9",
            flush: Flush::All,
        };
        let kept = unmade.keep(
            BLOCK,
            &naming,
            || Err(io::ErrorKind::Other.into()),
            None,
            || (),
        );
        assert!(kept.is_err() && !unmade.has_failed() && !folder.join("9").exists());
        unmade.finish();
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn what_does_not_fit_is_not_written_and_a_failure_stays() {
        let file = TemporaryFile::new(b"");
        let whole = journal(file.path(), 3 * BLOCK as u64);
        assert!(whole.append(&[1; BLOCK]).unwrap());
        assert!(!whole.append(&[2; 2 * BLOCK]).unwrap());
        assert!(whole.append(&[3; BLOCK]).unwrap());
        assert!(!whole.append(&[4; BLOCK]).unwrap());
        assert_eq!(fs::read(file.path()).unwrap()[2 * BLOCK..], [3; BLOCK]);
        assert!(whole.append(&[5; 0]).unwrap());
        thread::scope(|scope| {
            let finishing = scope.spawn(|| whole.finish());
            for _ in 0..3 {
                assert!(!finishing.is_finished());
                whole.settle();
            }
        });
        assert!(!whole.append(&[5; 0]).unwrap());
        let unwritable = File::open(file.path()).unwrap();
        let broken = JournalFile::new(unwritable.into(), [7; NONCE], 0, 1 << 20, true);
        for _ in 0..2 {
            assert_eq!(
                broken.append(&[1; BLOCK]).unwrap_err().raw_os_error(),
                Some(Errno::BADF.raw_os_error())
            );
        }
        let short = TemporaryFile::new(b"12");
        let opened = File::open(short.path()).unwrap();
        let error = whole.record(b"", Some((opened.as_fd(), 3))).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
