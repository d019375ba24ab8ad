package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"
)

// Config is what the agent can be told by its file and its environment.
type Config struct {
	Listen   string        `json:"listen"`
	Workers  int           `json:"workers"`
	Timeout  time.Duration `json:"-"`
	Hosts    []string      `json:"hosts"`
	CacheDir string        `json:"cache_dir"`

	TimeoutSeconds float64 `json:"timeout_seconds"`
}

// DefaultConfig holds for everything that is not set elsewhere.
func DefaultConfig() Config {
	return Config{
		Listen:         "127.0.0.1:8420",
		Workers:        4,
		TimeoutSeconds: 30,
		CacheDir:       "/var/cache/agent",
	}
}

// LoadConfig reads the file at path over the defaults, and the environment over that.
// A missing file is no error; unknown fields are.
func LoadConfig(path string, getenv func(string) string) (*Config, error) {
	config := DefaultConfig()
	file, err := os.Open(path)
	switch {
	case err == nil:
		defer file.Close()
		if err := decode(file, &config); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
	case !errors.Is(err, os.ErrNotExist):
		return nil, err
	}
	if err := config.applyEnvironment(getenv); err != nil {
		return nil, err
	}
	config.Timeout = time.Duration(config.TimeoutSeconds * float64(time.Second))
	if err := config.validate(); err != nil {
		return nil, err
	}
	return &config, nil
}

func decode(reader io.Reader, config *Config) error {
	decoder := json.NewDecoder(reader)
	decoder.DisallowUnknownFields()
	return decoder.Decode(config)
}

func (c *Config) applyEnvironment(getenv func(string) string) error {
	if value := getenv("AGENT_LISTEN"); value != "" {
		c.Listen = value
	}
	if value := getenv("AGENT_WORKERS"); value != "" {
		workers, err := strconv.Atoi(value)
		if err != nil {
			return fmt.Errorf("AGENT_WORKERS: %w", err)
		}
		c.Workers = workers
	}
	if value := getenv("AGENT_HOSTS"); value != "" {
		c.Hosts = splitList(value)
	}
	return nil
}

// splitList gives the parts between commas without surrounding blanks and empty parts.
func splitList(text string) []string {
	var parts []string
	for _, part := range strings.Split(text, ",") {
		if part = strings.TrimSpace(part); part != "" {
			parts = append(parts, part)
		}
	}
	return parts
}

func (c *Config) validate() error {
	if c.Workers < 1 || c.Workers > 256 {
		return fmt.Errorf("workers must be from 1 to 256, not %d", c.Workers)
	}
	if c.Timeout <= 0 {
		return errors.New("timeout_seconds must be positive")
	}
	if c.Listen == "" {
		return errors.New("listen must not be empty")
	}
	return nil
}
