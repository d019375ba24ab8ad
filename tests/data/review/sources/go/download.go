package agent

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
)

const maxArtefactBytes = 512 << 20

// ErrChecksum means that a download is not what it should be.
var ErrChecksum = errors.New("agent: checksum does not match")

// Artefact is a file that a host offers.
type Artefact struct {
	Name   string
	URL    string
	SHA256 string
}

// Downloader stores artefacts below a directory.
type Downloader struct {
	Client *http.Client
	Dir    string
}

// target is the path of an artefact, which has to be below the directory.
func (d *Downloader) target(name string) (string, error) {
	if !filepath.IsLocal(name) {
		return "", fmt.Errorf("agent: %q is not a name within the cache", name)
	}
	return filepath.Join(d.Dir, name), nil
}

// Fetch downloads an artefact, checks it and returns its path. Nothing stays behind when it fails.
func (d *Downloader) Fetch(ctx context.Context, artefact Artefact) (string, error) {
	path, err := d.target(artefact.Name)
	if err != nil {
		return "", err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, artefact.URL, nil)
	if err != nil {
		return "", err
	}
	response, err := d.Client.Do(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return "", fmt.Errorf("agent: %s answered %s", artefact.URL, response.Status)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return "", err
	}
	sum, err := d.save(path, response.Body)
	if err != nil {
		return "", err
	}
	if !strings.EqualFold(sum, artefact.SHA256) {
		return "", errors.Join(ErrChecksum, os.Remove(path))
	}
	return path, nil
}

// save writes body to path and returns the checksum of what was written.
func (d *Downloader) save(path string, body io.Reader) (sum string, err error) {
	file, err := os.Create(path)
	if err != nil {
		return "", err
	}
	defer func() {
		if closeErr := file.Close(); err == nil {
			err = closeErr
		}
		if err != nil {
			os.Remove(path)
		}
	}()
	hash := sha256.New()
	limited := io.LimitReader(body, maxArtefactBytes+1)
	written, err := io.Copy(io.MultiWriter(file, hash), limited)
	if err != nil {
		return "", err
	}
	if written > maxArtefactBytes {
		return "", fmt.Errorf("agent: %s is larger than %d bytes", path, maxArtefactBytes)
	}
	return hex.EncodeToString(hash.Sum(nil)), nil
}
