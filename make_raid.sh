#!/usr/bin/env bash
# One RAID 0 array (md) over whole NVMe drives, with a file system, mounted. Ratel does not need it: it stripes over
# --ssd DIR,DIR itself, see docs/storage.md.
#   ./make_raid.sh --mount DIR DEVICE DEVICE [DEVICE ...]   says what would be done, and changes nothing
#   ./make_raid.sh --undo /dev/mdX                          the same for taking such an array apart again
#   --apply           do it, after asking (needs root); every byte on the drives is lost
#   --yes             do not ask, for scripts
#   --fs xfs|ext4     file system (default: xfs)
#   --chunk SIZE      bytes on one drive before the next one's turn (default: 512K)
#   --options LIST    mount options (default: noatime)
#   --array /dev/mdX  name of the array (default: the first free one)
# Exit status: 0 done, 1 refused or failed, 2 a mistake in the arguments.
set -euo pipefail

MOUNT='' UNDO='' ARRAY='' FS=xfs CHUNK=512K OPTIONS=noatime APPLY='' YES=''
DEVICES=()
ARGUMENTS=("$@")
PROBLEMS=()
STEPS=()   # the plan: one shell-quoted command each, printed and then executed
SYSTEM_PATHS=(/ /boot /boot/efi /usr /var /home "$PWD")

say() { printf 'make_raid.sh: %s\n' "$(printable "$*")" >&2; }
die() { say "$*"; exit 1; }
misuse() { say "$*"; say "see ./make_raid.sh --help"; exit 2; }
refuse() { PROBLEMS+=("$*"); }
quoted() { local line; printf -v line '%q ' "$@"; printf '%s' "${line% }"; }
# What a drive or a directory is called comes from others, and may hold what a terminal obeys.
printable() { printf '%s' "${1//[[:cntrl:]]/?}"; }
joined() { printf '%s' "${1//$'\n'/, }"; }
plan() { STEPS+=("$(quoted "$@")"); }

parse() {
    while (($#)); do
        case $1 in
            --mount | --undo | --array | --fs | --chunk | --options)
                (($# > 1)) || misuse "$1 needs a value"
                set_option "$1" "$2"
                shift
                ;;
            --apply) APPLY=1 ;;
            --yes) YES=1 ;;
            -h | --help) sed -n '2,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
            -*) misuse "$1 is not an option" ;;
            *) DEVICES+=("$1") ;;
        esac
        shift
    done
}

set_option() {
    case $1 in
        --mount) MOUNT=$2 ;;
        --undo) UNDO=$2 ;;
        --array) ARRAY=$2 ;;
        --fs) FS=$2 ;;
        --chunk) CHUNK=$2 ;;
        --options) OPTIONS=$2 ;;
    esac
}

check_arguments() {
    if [[ -n $UNDO ]]; then
        [[ -z $MOUNT && ${#DEVICES[@]} == 0 ]] || misuse "--undo takes the array alone: its members are read from it"
        return
    fi
    [[ -n $MOUNT ]] || misuse "--mount DIR is missing"
    # The line for /etc/fstab separates its fields with blanks.
    [[ $MOUNT == /* && $MOUNT != *[[:space:]]* ]] ||
        misuse "--mount must be an absolute path without blanks (given: $MOUNT)"
    [[ $FS == xfs || $FS == ext4 ]] || misuse "--fs is xfs or ext4 (given: $FS)"
    [[ $CHUNK =~ ^[1-9][0-9]*[KM]$ ]] || misuse "--chunk is a number of K or M, like 512K (given: $CHUNK)"
    [[ $OPTIONS =~ ^[^[:space:]]+$ ]] || misuse "--options is a list without blanks (given: $OPTIONS)"
    [[ -z $ARRAY || $ARRAY =~ ^/dev/md[0-9]+$ ]] || misuse "--array is named like /dev/md0 (given: $ARRAY)"
    ((${#DEVICES[@]} >= 2)) || misuse "a RAID 0 takes two drives or more (given: ${#DEVICES[@]})"
}

require_tools() {
    local tool missing=()
    for tool in "$@"; do
        command -v "$tool" >/dev/null || missing+=("$tool")
    done
    ((${#missing[@]} == 0)) ||
        die "not found: ${missing[*]}. Install the packages mdadm, util-linux and xfsprogs or e2fsprogs"
}

# Of the device alone, and of the device and everything that is made of it (partitions, LVM, md), one line each.
only() { lsblk --nodeps --noheadings --raw --paths --output "$1" "$2" 2>/dev/null; }
all() { lsblk --noheadings --raw --paths --output "$1" "$2" 2>/dev/null; }

# Sets UNESCAPED: lsblk and findmnt write blanks, backslashes and what is not printable as \x20. Nothing else is an escape.
unescape() {
    local rest=$1 byte
    UNESCAPED=''
    while [[ $rest =~ ^([^\\]*)\\x([0-9a-fA-F]{2})(.*)$ ]]; do
        printf -v byte '%b' "\\x${BASH_REMATCH[2]}"
        UNESCAPED+=${BASH_REMATCH[1]}$byte
        rest=${BASH_REMATCH[3]}
    done
    UNESCAPED+=$rest
}

# Device numbers of what holds the system: not names, because / may be mounted from a name that does not exist.
system_numbers() {
    local path number
    for path in "${SYSTEM_PATHS[@]}"; do
        [[ -e $path ]] || continue
        number=$(findmnt --first-only --noheadings --raw --output MAJ:MIN --target "$path") ||
            die "cannot find what holds $path"
        printf '%s\t%s\n' "$number" "$path"
    done
}

look_around() {
    SYSTEM=$(system_numbers)
    SWAPS=$(swapon --noheadings --raw --show=NAME) || die "cannot list the swap space"
}

# What is true of a drive and of an array that may be overwritten: nothing is made of it, nor is it the system's.
check_unused() {
    local device=$1 numbers names system path held=''
    if ! numbers=$(all MAJ:MIN "$device") || ! names=$(all NAME,TYPE "$device"); then
        refuse "$device is not a block device"
        return
    fi
    while IFS=$'\t' read -r system path; do
        if [[ $'\n'$numbers$'\n' == *$'\n'"$system"$'\n'* ]]; then held+=${held:+, }$path; fi
    done <<<"$SYSTEM"
    [[ -z $held ]] || refuse "$device holds $held: the system needs it"
    [[ $names != *$'\n'* ]] || refuse "$device is in use or partitioned: $(joined "${names#*$'\n'}")"
    [[ $'\n'$SWAPS$'\n' != *$'\n'"$device"$'\n'* ]] || refuse "$device is swap space"
}

check_drive() {
    local device=$1 type targets signatures
    type=$(only TYPE "$device") || { refuse "$device is not a block device"; return; }
    [[ $type == disk ]] || { refuse "$device is not a whole drive (it is: $type)"; return; }
    [[ $(only RO "$device") == 0 ]] || refuse "$device is read-only"
    check_unused "$device"
    targets=$(findmnt --noheadings --raw --output TARGET --source "$device" || true)
    [[ -z $targets ]] || refuse "$device is mounted at $(joined "$targets")"
    if ! signatures=$(wipefs --noheadings --output TYPE "$device" 2>/dev/null); then
        refuse "$device cannot be searched for signatures: that takes root"
    elif [[ -n $signatures ]]; then
        refuse "$device has a signature ($(joined "$signatures")) and may hold data." \
            "If nobody needs it: sudo wipefs --all $device"
    fi
}

check_drives() {
    local device other seen=()
    look_around
    for device in "${DEVICES[@]}"; do
        for other in ${seen[@]+"${seen[@]}"}; do
            [[ $other != "$device" ]] || refuse "$device is given twice"
        done
        seen+=("$device")
        check_drive "$device"
    done
}

check_mount_directory() {
    if findmnt --mountpoint "$MOUNT" >/dev/null; then refuse "$MOUNT is a mount point already"; return; fi
    [[ -e $MOUNT ]] || return 0
    [[ -d $MOUNT ]] || { refuse "$MOUNT is not a directory"; return; }
    [[ -z $(ls -A "$MOUNT") ]] || refuse "$MOUNT is not empty: mounting would hide what is in it"
}

choose_array() {
    local number=0
    if [[ -n $ARRAY ]]; then
        [[ ! -e $ARRAY ]] || refuse "$ARRAY exists already"
        return
    fi
    while [[ -e /dev/md$number ]]; do number=$((number + 1)); done
    ARRAY=/dev/md$number
}

stop_at_problems() {
    ((${#PROBLEMS[@]})) || return 0
    local problem
    for problem in "${PROBLEMS[@]}"; do say "refused: $problem"; done
    die "nothing was changed"
}

plan_array() {
    # Not --run: where mdadm itself has a doubt it asks, reads the end of the input, and stops.
    plan mdadm --create "$ARRAY" --level=0 --metadata=1.2 --chunk="$CHUNK" --name="ratel-${ARRAY#/dev/}" \
        --raid-devices=${#DEVICES[@]} "${DEVICES[@]}"
    # Forced: the inside of a new array may show what an array taken apart earlier has left there.
    if [[ $FS == xfs ]]; then plan mkfs.xfs -q -f "$ARRAY"; else plan mkfs.ext4 -q -F -m 0 "$ARRAY"; fi
    plan mkdir -p "$MOUNT"
    plan mount -t "$FS" -o "$OPTIONS" "$ARRAY" "$MOUNT"
    if [[ -n ${SUDO_UID:-} ]]; then plan chown "$SUDO_UID:${SUDO_GID:-$SUDO_UID}" "$MOUNT"; fi
}

make() {
    local device resolved=()
    require_tools lsblk findmnt swapon wipefs blkid mdadm "mkfs.$FS"
    for device in "${DEVICES[@]}"; do resolved+=("$(readlink -m "$device")"); done  # names below /dev/disk are links
    DEVICES=("${resolved[@]}")
    check_drives
    check_mount_directory
    choose_array
    stop_at_problems
    plan_array
    printf 'A RAID 0 array %s over these drives; everything on them is lost:\n' "$ARRAY"
    for device in "${DEVICES[@]}"; do
        unescape "$device $(only SIZE,MODEL "$device")"
        printf '  %s\n' "$(printable "$UNESCAPED")"
    done
    confirm
    check_drives  # the answer may have taken long
    stop_at_problems
    execute "$(quoted "$0" --undo "$ARRAY" --apply)"
    printf 'Ready: --ssd %s. /etc/fstab was not changed; to mount it at every start, add the line\n' "$MOUNT"
    printf 'UUID=%s %s %s %s,nofail 0 0\n' "$(blkid -s UUID -o value "$ARRAY")" "$MOUNT" "$FS" "$OPTIONS"
}

# Sets MEMBERS from what the array says of itself, and refuses an array that this program did not make.
read_array() {
    local detail line name='' level='' count=''
    MEMBERS=()
    detail=$(mdadm --detail --export "$UNDO" 2>/dev/null) || die "$UNDO is not an md array; see cat /proc/mdstat"
    while IFS= read -r line; do
        case $line in
            MD_LEVEL=*) level=${line#*=} ;;
            MD_DEVICES=*) count=${line#*=} ;;
            MD_NAME=*) name=${line#*=} ;;
            MD_DEVICE_*_DEV=*) MEMBERS+=("${line#*=}") ;;
        esac
    done <<<"$detail"
    [[ $level == raid0 ]] || refuse "$UNDO is not a RAID 0 (it is: $level)"
    [[ ${name##*:} == ratel-md* ]] || refuse "$UNDO was not made by this program (its name is: ${name:-none})"
    [[ $count == "${#MEMBERS[@]}" ]] || refuse "$UNDO says it has $count members and names ${#MEMBERS[@]}"
}

check_array() {
    look_around
    read_array
    check_unused "$UNDO"
}

undo() {
    local target member before
    require_tools lsblk findmnt swapon mdadm umount
    UNDO=$(readlink -m "$UNDO")
    check_array
    stop_at_problems
    while IFS= read -r target; do
        unescape "$target"
        if [[ -n $target ]]; then plan umount "$UNESCAPED"; fi
    done < <(findmnt --noheadings --raw --output TARGET --source "$UNDO" || true)
    plan mdadm --stop "$UNDO"
    for member in "${MEMBERS[@]}"; do plan mdadm --zero-superblock "$member"; done
    printf 'The array %s is taken apart; its file system and everything in it is lost.\n' "$UNDO"
    before=${MEMBERS[*]}
    confirm
    check_array
    stop_at_problems
    [[ $before == "${MEMBERS[*]}" ]] || die "the members of $UNDO have changed meanwhile; nothing was changed"
    execute 'cat /proc/mdstat'
    printf 'Done. If /etc/fstab has a line for it, remove the line.\n'
}

confirm() {
    local answer=''
    printf 'Commands:\n'
    printf '  %s\n' "${STEPS[@]}"
    if [[ -z $APPLY ]]; then
        printf 'Nothing was changed. To do it: %s\n' "$(quoted sudo "$0" "${ARGUMENTS[@]}" --apply)"
        exit 0
    fi
    [[ $(id -u) == 0 ]] || die "--apply needs root; nothing was changed"
    if [[ -z $YES ]]; then
        printf 'Type yes to go on: '
        read -r answer || true
        [[ $answer == yes ]] || die "not confirmed; nothing was changed"
    fi
}

execute() {
    local step way_back=$1
    for step in "${STEPS[@]}"; do
        printf '+ %s\n' "$step"
        eval "$step" </dev/null || die "failed: $step. What was done before it stays; to see or take it back: $way_back"
    done
}

parse "$@"
check_arguments
if [[ -n $UNDO ]]; then undo; else make; fi
