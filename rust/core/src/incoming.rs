//! The files of images that are on their way.
//!
//! The problem: what arrives is to be on the disk as soon as its last byte is here, and nothing is to be left of
//! what never becomes whole. [`Incoming`] opens a file without a name and writes what comes before the dataset; who
//! has the [`Growing`] file writes the rest, and either links it to its place or drops it.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::os::fd::{OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, fsync, linkat, openat, statvfs, unlink, unlinkat};
use rustix::io::{Errno, write};

use crate::meta::prefix;
use crate::receive::Store;

/// Where the files of an association begin, and with what.
pub struct Incoming {
    /// On the file system where they are to stay.
    pub folder: PathBuf,
    /// Bytes that have to be free on it.
    pub least_free: u64,
    /// The AE title of the sender.
    pub title: String,
    /// The transfer syntax of each presentation context.
    pub syntaxes: Vec<(u8, String)>,
}

impl Incoming {
    /// A file that holds what comes before the dataset; None for an image without a UID, which nobody
    /// will keep.
    ///
    /// # Errors
    /// Where it cannot be opened or written; `NOSPC` where too little is free.
    pub fn begin(&self, store: &Store) -> Result<Option<Growing>, Errno> {
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
        let mut growing = self.open()?;
        self.write(&mut growing, &prefix(class, uid, syntax, &self.title))?;
        Ok(Some(growing))
    }

    /// Write all of a part.
    ///
    /// # Errors
    /// Where that fails, and some of it may be written; `NOSPC` where too little would be free after it.
    pub fn write(&self, growing: &mut Growing, bytes: &[u8]) -> Result<(), Errno> {
        let disk = statvfs(&self.folder)?;
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        if free.saturating_sub(bytes.len() as u64) < self.least_free {
            return Err(Errno::NOSPC);
        }
        growing.write(bytes)
    }

    fn open(&self) -> Result<Growing, Errno> {
        let (flags, mode) = (OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR);
        match openat(CWD, &self.folder, flags | OFlags::TMPFILE, mode) {
            Ok(file) => Ok(Growing { file, name: None }),
            // A file system that has no such files.
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT | Errno::INVAL) => self.open_named(),
            Err(error) => Err(error),
        }
    }

    fn open_named(&self) -> Result<Growing, Errno> {
        let random = |_| RandomState::new().build_hasher().finish();
        let [first, second] = [0, 1].map(random);
        let name = self.folder.join(format!("{first:016x}{second:016x}.part"));
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::CREATE | OFlags::EXCL;
        let file = openat(CWD, &name, flags, Mode::RUSR | Mode::WUSR)?;
        Ok(Growing {
            file,
            name: Some(Name(name)),
        })
    }
}

/// A UID by its looks; whether it is one is looked at before the image is kept.
fn uid_of(value: &[u8]) -> Option<&str> {
    let is_plain = |one: &u8| one.is_ascii_digit() || *one == b'.';
    let fits = (1..=64).contains(&value.len()) && value.iter().all(is_plain);
    std::str::from_utf8(value).ok().filter(|_| fits)
}

/// A file without a name, or with one that goes when this does.
pub struct Growing {
    file: OwnedFd,
    name: Option<Name>,
}

impl Growing {
    fn write(&mut self, bytes: &[u8]) -> Result<(), Errno> {
        let mut left = bytes;
        while !left.is_empty() {
            match write(&self.file, left) {
                Ok(count) => left = &left[count..],
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The descriptor and the name, which are the caller's from now on.
    #[must_use]
    pub fn give_away(self) -> (OwnedFd, Option<PathBuf>) {
        let name = self.name.map(|mut name| std::mem::take(&mut name.0));
        (self.file, name)
    }
}

/// Empty once somebody else has it.
struct Name(PathBuf);

impl Drop for Name {
    fn drop(&mut self) {
        if !self.0.as_os_str().is_empty() {
            let _ = unlink(&self.0);
        }
    }
}

/// Give an open file a name in a folder, also one without any; false where the name is taken. With `flush` the
/// name is durable then, or not there.
///
/// # Errors
/// Where that fails.
pub fn link(descriptor: RawFd, folder: &Path, name: &str, flush: bool) -> Result<bool, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let place = openat(CWD, folder, flags, Mode::empty())?;
    let file = format!("/proc/self/fd/{descriptor}");
    match linkat(&place, file, &place, name, AtFlags::SYMLINK_FOLLOW) {
        Ok(()) => {}
        Err(Errno::EXIST) => return Ok(false),
        Err(error) => return Err(error),
    }
    if flush && let Err(error) = fsync(&place) {
        let _ = unlinkat(&place, name, AtFlags::empty());
        return Err(error);
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::fd::AsRawFd;

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
        Incoming {
            folder: folder.path().to_owned(),
            least_free: 0,
            title: "SENDER".to_owned(),
            syntaxes: vec![(3, "1.2.840.10008.1.2.1".to_owned())],
        }
    }

    #[test]
    fn a_name_goes_with_its_file_unless_somebody_else_has_it() {
        let folder = Folder::new();
        let mut growing = incoming(&folder).open_named().unwrap();
        growing.write(b"whole").unwrap();
        let names = || fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(names(), 1);
        drop(growing);
        assert_eq!(names(), 0);
        let (file, name) = incoming(&folder).open_named().unwrap().give_away();
        for flush in [false, true] {
            let place = format!("placed-{flush}");
            let link = || link(file.as_raw_fd(), folder.path(), &place, flush);
            assert_eq!((link(), link()), (Ok(true), Ok(false)));
            fs::remove_file(folder.path().join(place)).unwrap();
        }
        assert_eq!(names(), 1);
        assert!(name.unwrap().starts_with(folder.path()));
    }

    #[test]
    fn without_a_uid_or_room_there_is_no_file() {
        let folder = Folder::new();
        let mut wanted = incoming(&folder);
        let mut store = Store {
            context: 3,
            sop_class_uid: b"1.2.840.10008.5.1.4.1.1.2".to_vec(),
            sop_instance_uid: b"1.2.3".to_vec(),
            ..Store::default()
        };
        assert!(wanted.begin(&store).unwrap().is_some());
        wanted.least_free = u64::MAX;
        assert_eq!(wanted.begin(&store).err(), Some(Errno::NOSPC));
        store.sop_instance_uid = b"1/2".to_vec();
        assert!(wanted.begin(&store).unwrap().is_none());
    }
}
