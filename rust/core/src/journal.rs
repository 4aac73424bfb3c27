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
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use rustix::fs::{fdatasync, unlink};
use rustix::io::{Errno, pread, pwrite};

use crate::digest::Kind;
use crate::incoming::link;

/// Each record begins at a multiple of it, so that one behind a damaged one is found.
pub const BLOCK: usize = 512;
/// Bytes that tell the records of this file from whatever was in it before.
pub const NONCE: usize = 16;
/// Bytes of a digest.
const CHECK: usize = 16;

/// An open file, from one place on.
pub struct JournalFile {
    file: OwnedFd,
    nonce: [u8; NONCE],
    size: u64,
    is_flushed: bool,
    state: Mutex<State>,
    /// For those whose records the same write takes: of every other write the same.
    written: [Condvar; 2],
    /// For who waits in `finish`.
    idle: Condvar,
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
    /// Records that nobody writes yet.
    waiting: Vec<u8>,
    /// Bytes of records that will come.
    promised: u64,
    /// How many there were in all, how many of these are kept, and how many settled.
    count: u64,
    kept: u64,
    settled: u64,
    is_writing: bool,
    /// How many have begun.
    writes: usize,
    is_finished: bool,
    failed: Option<Errno>,
}

impl JournalFile {
    /// Records go to `file` from `start` on, as long as they end before `size`. Unless it `is_flushed` they survive a killed
    /// process, not a power cut.
    #[must_use]
    pub fn new(file: OwnedFd, nonce: [u8; NONCE], start: u64, size: u64, is_flushed: bool) -> Self {
        JournalFile {
            file,
            nonce,
            size,
            is_flushed,
            state: Mutex::new(State {
                end: start,
                waiting: Vec::new(),
                promised: 0,
                count: 0,
                kept: 0,
                settled: 0,
                is_writing: false,
                writes: 0,
                is_finished: false,
                failed: None,
            }),
            written: [Condvar::new(), Condvar::new()],
            idle: Condvar::new(),
        }
    }

    /// Keep a record; false, and nothing is done, where it does not fit. Whoever does has to call `settle` in the end.
    ///
    /// # Errors
    /// Where that fails, and from then on.
    pub fn append(&self, record: &[u8]) -> io::Result<bool> {
        let state = self.lock();
        if !self.has_room(&state, record.len() as u64)? {
            return Ok(false);
        }
        self.add(state, record).map(|()| true)
    }

    /// Keep a record that fits.
    fn add<'a>(&'a self, mut state: MutexGuard<'a, State>, record: &[u8]) -> io::Result<()> {
        if let Some(error) = state.failed {
            self.tell(&state);
            return Err(error.into());
        }
        state.waiting.extend_from_slice(record);
        state.count += 1;
        let (mine, write) = (state.count, state.writes + 1);
        loop {
            if state.kept >= mine {
                return Ok(());
            }
            if let Some(error) = state.failed {
                return Err(error.into());
            }
            state = if state.is_writing {
                self.written[write % 2]
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner)
            } else {
                self.write(state)
            };
        }
    }

    /// Give an open file of `size` bytes a name, which is not flushed, and keep its record. Where it was kept, `settle` has to
    /// be called in the end.
    ///
    /// # Errors
    /// Where that fails; it has no name then.
    pub fn keep(
        &self,
        record: &[u8],
        opened: BorrowedFd<'_>,
        size: u64,
        folder: &Path,
        name: &str,
    ) -> io::Result<Kept> {
        let length = record.len() as u64;
        let mut state = self.lock();
        if !self.has_room(&state, length)? {
            return Ok(Kept::Full);
        }
        // A file that has lost its name cannot get another one: its record has to have room before that.
        state.promised += length;
        drop(state);
        let named = link(opened, size, folder, name, false);
        let mut state = self.lock();
        state.promised -= length;
        let kept = match named {
            Ok(true) => self.add(state, record).map(|()| Kept::Whole),
            Ok(false) => {
                self.tell(&state);
                return Ok(Kept::NameTaken);
            }
            Err(error) => {
                self.tell(&state);
                return Err(error);
            }
        };
        if kept.is_err() {
            let _ = unlink(folder.join(name));
        }
        kept
    }

    /// Whether a write or a flush has failed, so that no record is kept any more.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.lock().failed.is_some()
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

    /// What has to happen after a record was kept, and before its file is let go, has happened.
    pub fn settle(&self) {
        let mut state = self.lock();
        state.settled += 1;
        self.tell(&state);
    }

    /// Let nothing more fit, and wait until all that did has settled or has failed.
    pub fn finish(&self) {
        let mut state = self.lock();
        state.is_finished = true;
        // After a failure no other than those that were kept settle.
        let all = |state: &State| state.failed.map_or(state.count, |_| state.kept);
        while state.is_writing || state.promised > 0 || state.settled < all(&state) {
            let turned = self.idle.wait(state);
            state = turned.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Write and flush what waits by now.
    fn write<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let bytes = mem::take(&mut state.waiting);
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
        match outcome {
            Ok(()) => state.kept = last,
            Err(error) => state.failed = Some(error),
        }
        if state.waiting.is_empty() {
            let mut bytes = bytes;
            bytes.clear();
            state.waiting = bytes;
        }
        self.written[write % 2].notify_all();
        let next = &self.written[(write + 1) % 2];
        if state.failed.is_some() {
            next.notify_all();
        } else {
            // Of those who came meanwhile one writes for all.
            next.notify_one();
        }
        self.tell(&state);
        state
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
        let length = start
            .checked_add(size)
            .and_then(|sum| sum.checked_next_multiple_of(BLOCK))
            .ok_or(io::ErrorKind::OutOfMemory)?;
        let mut record = Vec::new();
        let no_memory = |_: TryReserveError| io::Error::from(io::ErrorKind::OutOfMemory);
        record.try_reserve_exact(length).map_err(no_memory)?;
        record.extend_from_slice(&self.nonce);
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

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
    fn a_record_has_room_before_its_image_has_a_name() {
        let file = TemporaryFile::new(b"");
        let folder = file.path().with_extension("folder");
        fs::create_dir(&folder).unwrap();
        let unnamed = || {
            let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::TMPFILE;
            rustix::fs::open(&folder, flags, rustix::fs::Mode::RWXU).unwrap()
        };
        let journal = journal(file.path(), 9 * BLOCK as u64);
        let record = [1; BLOCK];
        let taken = unnamed();
        let kept = journal.keep(&record, taken.as_fd(), 0, &folder, "0");
        assert_eq!(kept.unwrap(), Kept::Whole);
        journal.settle();
        let unfitting = [1; 8 * BLOCK];
        for (record, name, size, wanted) in [
            (&record[..], "0", 0, Ok(Kept::NameTaken)),
            (&unfitting[..], "9", 0, Ok(Kept::Full)),
            (&record[..], "9", 7, Err(())),
        ] {
            let opened = unnamed();
            let kept = journal.keep(record, opened.as_fd(), size, &folder, name);
            assert_eq!(kept.map_err(|_| ()), wanted);
        }
        let count = thread::scope(|scope| {
            let threads: Vec<_> = (1..=8)
                .map(|number| {
                    let (journal, folder, opened) = (&journal, &folder, unnamed());
                    scope.spawn(move || {
                        let name = number.to_string();
                        let kept = journal.keep(&[2; BLOCK], opened.as_fd(), 0, folder, &name);
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
        promising.lock().promised = BLOCK as u64;
        assert!(!promising.append(&[1; 2 * BLOCK]).unwrap());
        assert!(promising.append(&[1; BLOCK]).unwrap());
        let late = unnamed();
        let kept = journal.keep(&record, late.as_fd(), 0, &folder, "9");
        assert_eq!(kept.unwrap(), Kept::Full);
        let unwritable = File::open(file.path()).unwrap();
        let broken = JournalFile::new(unwritable.into(), [7; NONCE], 0, 1 << 20, true);
        for _ in 0..2 {
            let opened = unnamed();
            let kept = broken.keep(&record, opened.as_fd(), 0, &folder, "9");
            assert!(kept.is_err() && broken.has_failed() && !folder.join("9").exists());
        }
        broken.finish();
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
