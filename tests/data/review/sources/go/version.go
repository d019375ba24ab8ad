package agent

import (
	"fmt"
	"sort"
	"strconv"
	"strings"
)

// Version is a semantic version without build metadata.
type Version struct {
	Major, Minor, Patch int
	Pre                 []string
}

// ParseVersion reads versions such as 1.4.0, v2.0.1 and 1.0.0-rc.2+linux.
func ParseVersion(text string) (Version, error) {
	core := strings.TrimPrefix(text, "v")
	core, _, _ = strings.Cut(core, "+")
	core, pre, hasPre := strings.Cut(core, "-")
	parts := strings.Split(core, ".")
	if len(parts) != 3 {
		return Version{}, fmt.Errorf("version %q has not three numbers", text)
	}
	var numbers [3]int
	for i, part := range parts {
		number, err := strconv.Atoi(part)
		if err != nil || number < 0 {
			return Version{}, fmt.Errorf("version %q: %q is not a number", text, part)
		}
		numbers[i] = number
	}
	v := Version{Major: numbers[0], Minor: numbers[1], Patch: numbers[2]}
	if hasPre {
		v.Pre = strings.Split(pre, ".")
	}
	return v, nil
}

func compareInts(a, b int) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

// comparePre compares two parts of pre-releases: numbers as numbers, and before words.
func comparePre(a, b string) int {
	x, errX := strconv.Atoi(a)
	y, errY := strconv.Atoi(b)
	switch {
	case errX == nil && errY == nil:
		return compareInts(x, y)
	case errX == nil:
		return -1
	case errY == nil:
		return 1
	}
	return strings.Compare(a, b)
}

// Compare returns -1, 0 or 1. A pre-release comes before its release.
func (v Version) Compare(w Version) int {
	for _, pair := range [][2]int{{v.Major, w.Major}, {v.Minor, w.Minor}, {v.Patch, w.Patch}} {
		if c := compareInts(pair[0], pair[1]); c != 0 {
			return c
		}
	}
	if len(v.Pre) == 0 || len(w.Pre) == 0 {
		return compareInts(len(w.Pre), len(v.Pre))
	}
	for i := 0; i < len(v.Pre) && i < len(w.Pre); i++ {
		if c := comparePre(v.Pre[i], w.Pre[i]); c != 0 {
			return c
		}
	}
	return compareInts(len(v.Pre), len(w.Pre))
}

// Newest returns the highest release of versions, or false if there is none but pre-releases.
func Newest(versions []Version) (Version, bool) {
	sorted := append([]Version(nil), versions...)
	sort.Slice(sorted, func(i, j int) bool { return sorted[i].Compare(sorted[j]) > 0 })
	for _, v := range sorted {
		if len(v.Pre) == 0 {
			return v, true
		}
	}
	return Version{}, false
}
