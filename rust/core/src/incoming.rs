//! The files of images that are on their way.
//!
//! The problem: what arrives is to be on the disk as soon as its last byte is here, and nothing is to be left of
//! what never becomes whole. [`Incoming`] opens a file without a name and writes what comes before the dataset; who
//! has the [`Growing`] file writes the rest, and either links it to its place or drops it.
//!
//! To flush a name takes its time, and several names in one folder take as long as one. So files of large images can have names
//! ahead: many are made and flushed at once, and each is deleted when its image is dropped, or when whoever has taken it over
//! does not need it any more.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, fstat, fstatvfs, fsync, linkat, openat, statat, unlink, unlinkat,
};
use rustix::io::{Errno, writev};

use crate::meta::prefix;
use crate::receive::Store;

/// So much of a file is written at once while the rest is on its way.
const PART: u64 = 128 << 10;

/// How names ahead end.
const AHEAD: &str = "ahead";
/// After so many images more are likely.
const MANY: u8 = 2;
/// So many names are made ahead at a time at least and at most; between, as many as were made so far.
const NAMES: (usize, usize) = (4, 16);

/// Where the files of an association begin, and with what.
pub struct Incoming {
    folder: PathBuf,
    /// The folder, opened, once that was needed: its path need not be walked for each image.
    opened: Option<OwnedFd>,
    least_free: u64,
    title: String,
    syntaxes: Vec<(u8, String)>,
    named_above: Option<u64>,
    /// How many of the last images in a row were large.
    large: u8,
    /// Names of empty files, flushed.
    ahead: Vec<Name>,
    /// How many were made.
    made: usize,
    spare: Option<(OwnedFd, Option<Name>)>,
}

impl Incoming {
    /// Files begin in `folder`, which is on the file system where they are to stay, as long as `least_free` bytes are free on
    /// it; `title` is the AE title of the sender, and `syntaxes` are the transfer syntaxes of the presentation contexts. After two files
    /// of more bytes than `named_above`, the next one has a name ahead.
    #[must_use]
    pub fn new(
        folder: PathBuf,
        least_free: u64,
        title: String,
        syntaxes: Vec<(u8, String)>,
        named_above: Option<u64>,
    ) -> Self {
        Incoming {
            folder,
            opened: None,
            least_free,
            title,
            syntaxes,
            named_above,
            large: 0,
            ahead: Vec::new(),
            made: 0,
            spare: None,
        }
    }

    /// Open a file for the next image while nothing else is to be done: without a name, so that nothing is left of it
    /// whatever comes, or with one ahead. Where that fails, [`Incoming::begin`] tells.
    pub fn prepare(&mut self) {
        if self.spare.is_none() {
            self.spare = self.open_next().ok();
        }
    }

    /// What was ready for the next image, which may take its time to go.
    pub fn rest(&mut self) -> impl Send + use<> {
        (
            self.spare.take(),
            self.opened.take(),
            std::mem::take(&mut self.ahead),
        )
    }

    /// A file that holds what comes before the dataset; None for an image without a UID, which nobody
    /// will keep.
    ///
    /// # Errors
    /// Where it cannot be opened or written; `NOSPC` where too little is free.
    pub fn begin(&mut self, store: &Store) -> Result<Option<Growing>, Errno> {
        let (Some(class), Some(uid)) = (
            uid_of(&store.sop_class_uid),
            uid_of(&store.sop_instance_uid),
        ) else {
            return Ok(None);
        };
        let known = self.syntaxes.iter().find(|(one, _)| *one == store.context);
        let Some((_, syntax)) = known else {
            return Ok(None);
        };
        let head = prefix(class, uid, syntax, &self.title);
        let (file, name) = self.open()?;
        Ok(Some(Growing {
            file,
            name,
            start: head.len() as u64,
            size: head.len() as u64,
            head,
            is_counted: false,
        }))
    }

    /// Write what has come: all of it where it `is_last`, else whole parts of the file. How many bytes.
    ///
    /// # Errors
    /// Where that fails, and some of it may be written; `NOSPC` where too little would be free after it.
    pub fn write(
        &mut self,
        growing: &mut Growing,
        bytes: &[u8],
        is_last: bool,
    ) -> Result<usize, Errno> {
        let count = if is_last {
            bytes.len()
        } else {
            // The page cache takes what begins and ends at large powers of two in fewer, larger pages.
            let rest = usize::try_from((growing.size + bytes.len() as u64) % PART).unwrap_or(0);
            bytes.len().saturating_sub(rest)
        };
        if count == 0 && !is_last {
            return Ok(0);
        }
        // Not of the file: a quota of the folder is told of the folder only.
        let disk = fstatvfs(self.place()?)?;
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        let wanted = (growing.head.len() + count) as u64;
        if free.saturating_sub(wanted) < self.least_free {
            return Err(Errno::NOSPC);
        }
        growing.write(&bytes[..count])?;
        if is_last {
            let is_large = self.named_above.is_some_and(|most| growing.size > most);
            // One that is larger than the memory for it has several last bytes.
            let more = u8::from(!growing.is_counted);
            self.large = if is_large {
                self.large.saturating_add(more)
            } else {
                0
            };
            growing.is_counted = true;
        }
        Ok(count)
    }

    fn open(&mut self) -> Result<(OwnedFd, Option<Name>), Errno> {
        if let Some(spare) = self.spare.take() {
            return Ok(spare);
        }
        match self.open_next() {
            Ok(next) => Ok(next),
            // A file system that has no such files.
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT | Errno::INVAL) => self
                .open_named("part")
                .map(|(file, name)| (file, Some(name))),
            Err(error) => Err(error),
        }
    }

    fn open_next(&mut self) -> Result<(OwnedFd, Option<Name>), Errno> {
        if self.large >= MANY
            && let Ok(named) = self.open_ahead()
        {
            return Ok(named);
        }
        self.open_unnamed().map(|file| (file, None))
    }

    /// A file that has a name ahead.
    fn open_ahead(&mut self) -> Result<(OwnedFd, Option<Name>), Errno> {
        if self.ahead.is_empty() {
            let count = self.made.clamp(NAMES.0, NAMES.1);
            let opened = (0..count).map(|_| Ok(self.open_named(AHEAD)?.1));
            let mut names = opened.collect::<Result<Vec<_>, Errno>>()?;
            fsync(self.place()?)?;
            for name in &mut names {
                name.is_durable = true;
            }
            self.ahead = names;
            self.made += count;
        }
        let name = self.ahead.pop().ok_or(Errno::NOENT)?;
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = openat(CWD, &name.path, flags, Mode::empty())?;
        Ok((file, Some(name)))
    }

    fn open_unnamed(&mut self) -> Result<OwnedFd, Errno> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::TMPFILE;
        let found = openat(self.place()?, ".", flags, Mode::RUSR | Mode::WUSR);
        if found.is_err() {
            // There may be another folder at its path by now.
            self.opened = None;
        }
        found
    }

    fn place(&mut self) -> Result<BorrowedFd<'_>, Errno> {
        if self.opened.is_none() {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            self.opened = Some(openat(CWD, &self.folder, flags, Mode::empty())?);
        }
        self.opened.as_ref().map(OwnedFd::as_fd).ok_or(Errno::BADF)
    }

    fn open_named(&self, kind: &str) -> Result<(OwnedFd, Name), Errno> {
        let random = |_| RandomState::new().build_hasher().finish();
        let [first, second] = [0, 1].map(random);
        let path = self
            .folder
            .join(format!("{first:016x}{second:016x}.{kind}"));
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::CREATE | OFlags::EXCL;
        let file = openat(CWD, &path, flags, Mode::RUSR | Mode::WUSR)?;
        let name = Name {
            path,
            is_durable: false,
            stays: false,
            owner: std::process::id(),
        };
        Ok((file, name))
    }
}

/// A UID by its looks; whether it is one is looked at before the image is kept.
fn uid_of(value: &[u8]) -> Option<&str> {
    let is_plain = |one: &u8| one.is_ascii_digit() || *one == b'.';
    let fits = (1..=64).contains(&value.len()) && value.iter().all(is_plain);
    std::str::from_utf8(value).ok().filter(|_| fits)
}

/// A file without a name, or with one that goes when this does; where it was linked it stays.
pub struct Growing {
    file: OwnedFd,
    name: Option<Name>,
    /// What comes before the dataset, until it is written.
    head: Vec<u8>,
    start: u64,
    /// Bytes that are written, and those of the head.
    size: u64,
    is_counted: bool,
}

impl Growing {
    /// Write the head, if that is to be written yet, and these bytes.
    fn write(&mut self, bytes: &[u8]) -> Result<(), Errno> {
        let head = std::mem::take(&mut self.head);
        let whole = head.len() + bytes.len();
        let mut written = 0;
        while written < whole {
            let behind = written.saturating_sub(head.len());
            let left = [
                IoSlice::new(head.get(written..).unwrap_or_default()),
                IoSlice::new(&bytes[behind..]),
            ];
            match writev(&self.file, &left) {
                Ok(count) => written += count,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        self.size += bytes.len() as u64;
        Ok(())
    }

    /// Whether it has a name, which has to be deleted.
    #[must_use]
    pub fn has_name(&self) -> bool {
        self.name.is_some()
    }

    /// The name in the folder where it began, if that is on the disk: once the file is flushed, nothing loses it.
    #[must_use]
    pub fn durable_name(&self) -> Option<&str> {
        let name = self.name.as_ref().filter(|one| one.is_durable)?;
        name.path.file_name()?.to_str()
    }

    /// Let it keep that name: who calls this deletes it some time.
    pub fn stay(&mut self) {
        if let Some(mut name) = self.name.take() {
            name.stays = true;
        }
    }

    /// How many bytes come before the dataset.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.start
    }
}

impl AsFd for Growing {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

struct Name {
    path: PathBuf,
    is_durable: bool,
    stays: bool,
    owner: u32,
}

impl Drop for Name {
    fn drop(&mut self) {
        // A process that was forked has a copy.
        if !self.stays && self.owner == std::process::id() {
            let _ = unlink(&self.path);
        }
    }
}

/// What is flushed when a file gets a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    Nothing,
    /// The file, which has another name that is on the disk.
    File,
    /// The file before it has the name, and then the name.
    All,
}

/// Give an open file of `size` bytes a name in a folder, also one without any; false where the name is taken. Where
/// that cannot be flushed, it is not there.
///
/// # Errors
/// Where that fails, or it has another size.
pub fn link(
    opened: BorrowedFd<'_>,
    size: u64,
    folder: &Path,
    name: &str,
    flush: Flush,
) -> io::Result<bool> {
    if flush != Flush::All {
        let path = folder.join(name);
        if flush == Flush::File {
            // As below.
            if statat(CWD, &path, AtFlags::SYMLINK_NOFOLLOW).is_ok() {
                return Ok(false);
            }
            fsync(opened)?;
        }
        return give_name(opened, size, CWD, &path);
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let place = openat(CWD, folder, flags, Mode::empty())?;
    // A flush for each name that is taken would be one for each image of that name.
    if statat(&place, name, AtFlags::SYMLINK_NOFOLLOW).is_ok() {
        return Ok(false);
    }
    fsync(opened)?;
    if !give_name(opened, size, place.as_fd(), Path::new(name))? {
        return Ok(false);
    }
    if let Err(error) = fsync(&place) {
        let _ = unlinkat(&place, name, AtFlags::empty());
        return Err(error.into());
    }
    Ok(true)
}

fn give_name(
    opened: BorrowedFd<'_>,
    size: u64,
    place: BorrowedFd<'_>,
    path: &Path,
) -> io::Result<bool> {
    let found = fstat(opened)?.st_size;
    if u64::try_from(found) != Ok(size) {
        let trouble = format!("{found} of {size} bytes are in the file");
        return Err(io::Error::other(trouble));
    }
    match linkat(opened, "", place, path, AtFlags::EMPTY_PATH).or_else(|error| match error {
        // Before Linux 6.10 that was for the superuser.
        Errno::NOENT | Errno::PERM => {
            let file = format!("/proc/self/fd/{}", opened.as_raw_fd());
            linkat(CWD, file, place, path, AtFlags::SYMLINK_FOLLOW)
        }
        other => Err(other),
    }) {
        Ok(()) => Ok(true),
        Err(Errno::EXIST) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    use crate::testing::TemporaryFile;

    /// A folder that is removed in the end.
    struct Folder(PathBuf);

    impl Folder {
        fn new() -> Self {
            let file = TemporaryFile::new(b"");
            let path = file.path().with_extension("folder");
            fs::create_dir(&path).unwrap();
            Folder(path)
        }

        fn path(&self) -> &std::path::Path {
            &self.0
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn incoming(folder: &Folder) -> Incoming {
        let syntaxes = vec![(3, "1.2.840.10008.1.2.1".to_owned())];
        Incoming::new(
            folder.path().to_owned(),
            0,
            "SENDER".to_owned(),
            syntaxes,
            Some(1000),
        )
    }

    fn store() -> Store {
        Store {
            context: 3,
            sop_class_uid: b"1.2.840.10008.5.1.4.1.1.2".to_vec(),
            sop_instance_uid: b"1.2.3".to_vec(),
            ..Store::default()
        }
    }

    #[test]
    fn a_file_that_was_prepared_is_for_one_image_and_leaves_nothing() {
        let folder = Folder::new();
        let mut wanted = incoming(&folder);
        wanted.prepare();
        let prepared = wanted.spare.as_ref().unwrap().0.as_raw_fd();
        wanted.prepare();
        let first = wanted.begin(&store()).unwrap().unwrap();
        assert_eq!(first.as_fd().as_raw_fd(), prepared);
        assert!(wanted.spare.is_none() && !first.has_name());
        let second = wanted.begin(&store()).unwrap().unwrap();
        assert_ne!(second.as_fd().as_raw_fd(), prepared);
        wanted.prepare();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        drop((wanted, second));
        assert!(link(first.as_fd(), 0, folder.path(), "first", Flush::All).unwrap());
        fs::remove_dir_all(folder.path()).unwrap();
        let mut wanted = incoming(&folder);
        wanted.prepare();
        assert_eq!(wanted.begin(&store()).map(|_| ()), Err(Errno::NOENT));
    }

    #[test]
    fn a_name_goes_with_its_file_and_what_is_linked_stays() {
        let folder = Folder::new();
        let (file, name) = incoming(&folder).open_named("part").unwrap();
        let mut growing = Growing {
            file,
            name: Some(name),
            head: b"he".to_vec(),
            start: 2,
            size: 2,
            is_counted: false,
        };
        growing.write(b"whole").unwrap();
        let names = || fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(names(), 1);
        for flush in [Flush::Nothing, Flush::File, Flush::All] {
            let place = format!("placed-{flush:?}");
            let link = |size| link(growing.as_fd(), size, folder.path(), &place, flush);
            let trouble = link(6).unwrap_err().to_string();
            assert_eq!(trouble, "7 of 6 bytes are in the file");
            assert_eq!((link(7).unwrap(), link(7).unwrap()), (true, false));
        }
        drop(growing);
        assert_eq!(names(), 3);
        assert_eq!(
            fs::read(folder.path().join("placed-All")).unwrap(),
            b"hewhole"
        );
    }

    #[test]
    fn after_a_large_image_files_have_names_ahead_and_only_those_that_are_to_stay_do() {
        let folder = Folder::new();
        let names = || fs::read_dir(folder.path()).unwrap().count();
        let mut wanted = incoming(&folder);
        let receive = |wanted: &mut Incoming, size: usize| {
            wanted.prepare();
            let mut file = wanted.begin(&store()).unwrap().unwrap();
            wanted.write(&mut file, &vec![7; size], true).unwrap();
            file
        };
        for size in [3000, 10, 3000, 3000] {
            assert!(!receive(&mut wanted, size).has_name());
            assert_eq!(names(), 0);
        }
        let mut file = receive(&mut wanted, 2000);
        assert_eq!(names(), 4);
        let name = file.durable_name().unwrap().to_owned();
        file.stay();
        assert!(file.durable_name().is_none() && !file.has_name());
        drop(file);
        assert!(
            fs::read(folder.path().join(&name))
                .unwrap()
                .ends_with(&[7; 2000])
        );
        for left in [3, 2, 1] {
            assert_eq!(names(), 1 + left);
            drop(receive(&mut wanted, 2000));
        }
        assert_eq!(names(), 1);
        // The next one is small, and has a name all the same; the one after it has none.
        assert!(receive(&mut wanted, 10).durable_name().is_some());
        assert_eq!(names(), 1 + 3);
        for _ in 0..2 {
            assert!(!receive(&mut wanted, 2000).has_name());
        }
        assert!(receive(&mut wanted, 2000).durable_name().is_some());
        // A name that somebody has deleted is none, and the next one is.
        fs::remove_file(&wanted.ahead.last().unwrap().path).unwrap();
        assert!(!receive(&mut wanted, 2000).has_name());
        assert!(receive(&mut wanted, 2000).durable_name().is_some());
        drop(wanted.rest());
        assert_eq!(names(), 1);
        // One that comes in several parts is one.
        let mut parts = incoming(&folder);
        let mut file = parts.begin(&store()).unwrap().unwrap();
        for _ in 0..3 {
            parts.write(&mut file, &[7; 2000], true).unwrap();
        }
        assert_eq!(parts.large, 1);
        drop(file);
        drop(wanted);
        let mut never = incoming(&folder);
        never.named_above = None;
        for _ in 0..3 {
            assert!(!receive(&mut never, 3000).has_name());
        }
    }

    #[test]
    fn without_a_uid_or_room_there_is_no_file() {
        let folder = Folder::new();
        let mut wanted = incoming(&folder);
        let mut store = store();
        assert!(wanted.begin(&store).unwrap().is_some());
        wanted.least_free = u64::MAX;
        assert_eq!(
            wanted.begin(&store).map(|_| ()),
            Ok(()),
            "nothing is written before there is something to write"
        );
        let mut growing = wanted.begin(&store).unwrap().unwrap();
        assert_eq!(wanted.write(&mut growing, b"", true), Err(Errno::NOSPC));
        store.sop_instance_uid = b"1/2".to_vec();
        assert!(wanted.begin(&store).unwrap().is_none());
    }

    #[test]
    fn parts_end_where_large_pages_do_and_the_last_one_anywhere() {
        let folder = Folder::new();
        let mut wanted = incoming(&folder);
        let store = store();
        let bytes: Vec<u8> = (0..300_000_u32).map(|one| one.to_le_bytes()[0]).collect();
        let mut growing = wanted.begin(&store).unwrap().unwrap();
        let head = growing.head.clone();
        let mut done = 0;
        for end in [1000, 130_000, 131_072, 262_144, 262_145] {
            done += wanted
                .write(&mut growing, &bytes[done..end], false)
                .unwrap();
            assert_eq!(
                done,
                (head.len() + end) / 131_072 * 131_072 - usize::from(end > 130_000) * head.len()
            );
        }
        done += wanted.write(&mut growing, &bytes[done..], true).unwrap();
        assert_eq!(done, bytes.len());
        assert_eq!(growing.start(), head.len() as u64);
        let path = format!("/proc/self/fd/{}", growing.as_fd().as_raw_fd());
        assert_eq!(fs::read(path).unwrap(), [head, bytes].concat());
    }
}
